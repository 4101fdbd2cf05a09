"""``dalle-mini interpolate``: pictures on the way from one picture to another, through CLIP's space."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_mini_impl.cli.by_embedding import (
    BatchSize,
    Candidates,
    Checkpoint,
    Guidance,
    Out,
    Prompt,
    Seed,
    Temperature,
    Upscale,
)


def interpolate(
    first: Annotated[Path, typer.Argument(help="The picture to start from.")],
    second: Annotated[Path, typer.Argument(help="The picture to arrive at.")],
    checkpoint: Checkpoint,
    steps: Annotated[int, typer.Option(min=2, help="Pictures on the way, both ends included.")] = 5,
    prompt: Prompt = "",
    candidates: Candidates = 8,
    seed: Seed = 0,
    guidance: Guidance = None,
    temperature: Temperature = None,
    upscale: Upscale = None,
    batch_size: BatchSize = None,
    out: Out = Path("outputs"),
) -> None:
    """Draw the way from one picture to another: the best of the candidates of each step.

    Embeddings are interpolated along the sphere. Writes PNGs that `replay` draws again, results.jsonl and sheet.png,
    between the two given pictures.
    """
    from dalle_mini_impl.cli.by_embedding import load, read_picture, write, write_sheet
    from dalle_mini_impl.cli.sample import common_facts

    ends = read_picture(first), read_picture(second)
    model, settings = load(checkpoint, out, guidance=guidance, temperature=temperature, upscale=upscale)
    ranked = model.interpolate(
        *ends, steps, prompt, candidates=candidates, keep=1, seed=seed, settings=settings, batch_size=batch_size
    )
    shares = [round(step / (steps - 1), 4) for step in range(steps)]
    common = {**common_facts(model, checkpoint, settings), "pictures": [str(first), str(second)]}
    write(ranked, [{"share": share} for share in shares], out, f"{first.stem} to {second.stem}", common)
    way = [(drawn[0].image, f"{share:.0%}") for drawn, share in zip(ranked, shares, strict=True)]
    write_sheet(f"{first.name} to {second.name}", [(ends[0], "given"), *way, (ends[1], "given")], out)
