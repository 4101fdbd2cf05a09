"""``dalle-mini caption``: captions for pictures, written by the checkpoint's captioner."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer


def caption(
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    candidates: Annotated[int, typer.Option(min=1, help="Captions to write for each picture.")] = 8,
    keep: Annotated[int, typer.Option(min=1, help="Best captions to show of each picture.")] = 1,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    checkpoint: Annotated[str, typer.Option(help="A built-in name, a folder or a Hub id.")] = "emoji",
    out: Annotated[Path | None, typer.Option(help="File for a JSON line a picture and caption.")] = None,
) -> None:
    """Write captions for pictures: of several for each, the ones that fit best by all scores come first.

    The first is written of the likeliest words, the others are drawn. The scores are those of `score`.
    """
    from dalle_mini_impl.cli.pictures import find_pictures, read_pictures
    from dalle_mini_impl.cli.processes import process_state
    from dalle_mini_impl.drawn import check_counts
    from dalle_mini_impl.files import write_json_lines
    from dalle_mini_impl.pipeline import TextToImage

    check_counts(candidates, keep)
    model = TextToImage.from_pretrained(checkpoint, process_state().device)
    rows: list[dict[str, Any]] = []
    read: list[Path] = []
    for picture in read_pictures(find_pictures(pictures), read):
        found = model.caption(picture, candidates, seed)[:keep]
        rows += [{"file": str(read[-1]), **asdict(item)} for item in found]
        typer.echo(f"{read[-1]}: {'; '.join(item.caption for item in found)}")
    if not rows:
        raise ValueError("there is no readable picture")
    if out is not None:
        write_json_lines(out, rows)
