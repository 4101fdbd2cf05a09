"""``dalle-mini vary``: new pictures of what a picture shows, by its CLIP embedding."""

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


def vary(
    picture: Annotated[Path, typer.Argument(help="A picture, drawn here or any other.")],
    checkpoint: Checkpoint,
    prompt: Prompt = "",
    candidates: Candidates = 8,
    keep: Annotated[int | None, typer.Option(min=1, help="Best pictures to keep. (default all)")] = None,
    seed: Seed = 0,
    guidance: Guidance = None,
    temperature: Temperature = None,
    upscale: Upscale = None,
    batch_size: BatchSize = None,
    out: Out = Path("outputs"),
) -> None:
    """Draw variations of a picture: what CLIP sees in it stays, the rest is drawn anew.

    Writes PNGs that `replay` draws again, results.jsonl and sheet.png, the given picture first.
    """
    from dalle_mini_impl.cli.by_embedding import load, read_picture, write, write_sheet
    from dalle_mini_impl.cli.sample import common_facts, label

    original = read_picture(picture)
    model, settings = load(checkpoint, out, guidance=guidance, temperature=temperature, upscale=upscale)
    keep = candidates if keep is None else keep
    ranked = model.vary(
        original, prompt, candidates=candidates, keep=keep, seed=seed, settings=settings, batch_size=batch_size
    )
    common = {**common_facts(model, checkpoint, settings), "picture": str(picture)}
    write([ranked], [{}], out, f"variation of {picture.stem}", common)
    cells = [(original, "given"), *((drawn.image, label(drawn)) for drawn in ranked)]
    write_sheet(f"variations of {picture.name}" + (f", {prompt}" if prompt else ""), cells, out)
