"""``dalle-mini score``: how well captions fit pictures, by every score that a checkpoint has."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dalle_mini_impl.cli.pictures import CLIP_HELP


def score(
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    caption: Annotated[list[str], typer.Option(help="A caption; give several to compare them.")],
    checkpoint: Annotated[str, typer.Option(help="A built-in name, a folder or a Hub id.")] = "emoji",
    clip: Annotated[str | None, typer.Option(help=CLIP_HELP)] = None,
    out: Annotated[Path | None, typer.Option(help="File for a JSON line a picture and caption.")] = None,
) -> None:
    """Score captions against pictures; the best caption of each picture comes first.

    score is what `sample` ranks by. clip_score is CLIP's cosine. read_score is log p(caption | picture) in nats, of
    checkpoints with a captioner or a DALL·E that reads. log_likelihood is log p(picture | caption) in nats, over the
    picture's tokens.
    """
    from dalle_mini_impl.cli.pictures import find_pictures, read_pictures
    from dalle_mini_impl.cli.processes import process_state
    from dalle_mini_impl.files import write_json_lines
    from dalle_mini_impl.pipeline import TextToImage

    model = TextToImage.from_pretrained(checkpoint, process_state().device, clip)
    rows: list[dict[str, Any]] = []
    read: list[Path] = []
    for picture in read_pictures(find_pictures(pictures), read):
        scores = model.score([picture] * len(caption), caption)
        rows += [{"file": str(read[-1]), **asdict(item)} for item in sorted(scores, key=lambda item: -item.score)]
    if not rows:
        raise ValueError("there is no readable picture")
    for row in rows:
        numbers = [f"{name} {value:.3f}" for name, value in row.items() if isinstance(value, float)]
        typer.echo(f"{row['file']}  {row['caption']!r}: {', '.join(numbers)}")
    if out is not None:
        write_json_lines(out, rows)
