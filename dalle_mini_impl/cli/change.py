"""``dalle-mini change``: a picture changed as two captions say, by their difference in CLIP's space."""

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


def change(
    picture: Annotated[Path, typer.Argument(help="A picture, drawn here or any other.")],
    checkpoint: Checkpoint,
    before: Annotated[str, typer.Option("--from", help='What it shows, "a red circle".')],
    after: Annotated[str, typer.Option("--to", help='What it is to show, "a blue circle".')],
    strength: Annotated[
        list[float] | None,
        typer.Option(help="How far to go, 0 to 1; may be given several times. (default 0.2 0.35 0.5)"),
    ] = None,
    prompt: Prompt = "",
    candidates: Candidates = 8,
    seed: Seed = 0,
    guidance: Guidance = None,
    temperature: Temperature = None,
    upscale: Upscale = None,
    batch_size: BatchSize = None,
    out: Out = Path("outputs"),
) -> None:
    """Draw a picture changed by text: its embedding is turned to the difference of the two captions' embeddings.

    All strengths are drawn with the same noise, and the best of the candidates is kept. Writes PNGs that `replay` draws
    again, results.jsonl and sheet.png, the given picture first.
    """
    from dalle_mini_impl.cli.by_embedding import load, read_picture, write, write_sheet
    from dalle_mini_impl.cli.sample import common_facts
    from dalle_mini_impl.pipeline import DEFAULT_STRENGTHS

    original = read_picture(picture)
    model, settings = load(checkpoint, out, guidance=guidance, temperature=temperature, upscale=upscale)
    strengths = strength or list(DEFAULT_STRENGTHS)
    ranked = model.change(
        original,
        before,
        after,
        strengths,
        prompt,
        candidates=candidates,
        keep=1,
        seed=seed,
        settings=settings,
        batch_size=batch_size,
    )
    common = {**common_facts(model, checkpoint, settings), "picture": str(picture), "from": before, "to": after}
    write(ranked, [{"strength": value} for value in strengths], out, f"{picture.stem} to {after}", common)
    cells = [(drawn[0].image, f"{value:g}") for drawn, value in zip(ranked, strengths, strict=True)]
    write_sheet(f"{before} to {after}", [(original, "given"), *cells], out)
