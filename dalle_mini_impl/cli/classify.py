"""``dalle-mini classify``: which of some labels a picture shows, by CLIP, which was never trained on them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dalle_mini_impl.cli.pictures import CLIP_HELP

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

_SHOWN = 3
_CELL_PX, _LEAST_CELL_PX, _TABLE_PX = 40, 4, 4000


def classify(
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    labels: Annotated[str, typer.Option(help='"a circle,a square", or a file with a label a line.')],
    template: Annotated[
        list[str] | None, typer.Option(help='Text around a label, "a picture of {}"; several are averaged.')
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="A built-in name, a folder or a Hub id.")] = "emoji",
    clip: Annotated[str | None, typer.Option(help=CLIP_HELP)] = None,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="The name of a picture's folder is its true label: count and compare.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for labels.jsonl and, with --accuracy, confusion.png.")
    ] = None,
) -> None:
    """Classify pictures without training: the label whose text is nearest to the picture wins.

    Prints the likeliest labels of each picture with their probabilities.
    """
    from dalle_mini_impl.classify import PLAIN_TEMPLATE, ZeroShotClassifier
    from dalle_mini_impl.cli.pictures import find_pictures, load_embedder, read_pictures
    from dalle_mini_impl.cli.processes import process_state
    from dalle_mini_impl.sheet import is_sheet

    names = read_labels(labels)
    embedder = load_embedder(checkpoint, clip, process_state().device)
    classifier = ZeroShotClassifier(embedder, names, template or [PLAIN_TEMPLATE])
    found = find_pictures(pictures)
    if accuracy:
        check_folders([path for path in found if not is_sheet(path)], names)
    paths: list[Path] = []
    probabilities = classifier.probabilities(read_pictures(found, paths))
    rows = [_row(path, names, shares) for path, shares in zip(paths, probabilities, strict=True)]
    for row in rows:
        likeliest = sorted(row["probabilities"].items(), key=lambda pair: -pair[1])[:_SHOWN]
        typer.echo("  ".join([f"{row['file']}:", *(f"{label} {share:.1%}" for label, share in likeliest)]))
    confusion = None
    if accuracy:
        confusion = count(rows, names)
        right = sum(confusion[index][index] for index in range(len(names)))
        typer.echo(f"{right} of {len(rows)} right ({right / len(rows):.1%}; chance {1 / len(names):.1%})")
    if out is not None:
        _write(out, rows, names, confusion)


def read_labels(text: str) -> list[str]:
    """Labels of a comma-separated text or of a file with one a line; ValueError for a file that can't be read."""
    from dalle_mini_impl.data.columns import read_lines

    if text.endswith(".txt") or os.path.isfile(text):  # where Path.is_file raises for a text longer than a name may be
        return read_lines(Path(text), "labels")
    return split_labels(text)


def split_labels(text: str) -> list[str]:
    """Labels with a comma between them."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _row(path: Path, names: Sequence[str], shares: Tensor) -> dict[str, Any]:
    probabilities = dict(zip(names, (round(share, 6) for share in shares.tolist()), strict=True))
    return {"file": str(path), "label": names[int(shares.argmax())], "probabilities": probabilities}


def count(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[list[int]]:
    """How often pictures of each true label (rows) were called each label (columns).

    The true label is the name of the folder, with or without its article; `check_folders` finds those that are none.
    """
    known = {_plain(name): index for index, name in enumerate(names)}
    confusion = [[0] * len(names) for _ in names]
    for row in rows:
        confusion[known[_plain(_folder(Path(row["file"])))]][names.index(row["label"])] += 1
    return confusion


def check_folders(paths: Sequence[Path], names: Sequence[str]) -> None:
    """Raises ValueError that names the first picture whose folder is called like none of the labels."""
    known = {_plain(name) for name in names}
    for path in paths:
        if _plain(_folder(path)) not in known:
            raise ValueError(f"{path}: its folder {_folder(path)!r} is none of the labels {', '.join(names)}")


def _folder(path: Path) -> str:
    return path.resolve().parent.name


def _plain(label: str) -> str:
    words = label.replace("_", " ").replace("-", " ").lower().split()
    return " ".join(words[1:] if words and words[0] in ("a", "an", "the") else words)


def _write(out: Path, rows: Sequence[dict[str, Any]], names: Sequence[str], confusion: list[list[int]] | None) -> None:
    from dalle_mini_impl.files import naming, write_json_lines

    out.mkdir(parents=True, exist_ok=True)
    write_json_lines(out / "labels.jsonl", rows)
    if confusion is not None:
        with naming(out / "confusion.png"):
            confusion_picture(confusion, names).save(out / "confusion.png")


def confusion_picture(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> Image.Image:
    """The counts as a table: true labels down, what they were called across, darker where it happens more often.

    Of very many labels the cells are small, without their numbers and names.
    """
    from PIL import Image, ImageDraw, ImageFont

    cell, font = max(_LEAST_CELL_PX, min(_CELL_PX, _TABLE_PX // len(names))), ImageFont.load_default(12)
    if cell < _CELL_PX // 2:
        table = Image.new("L", (len(names), len(names)))
        totals = [max(1, sum(counts)) for counts in confusion]
        rows = zip(confusion, totals, strict=True)
        table.putdata([round(255 * (1 - number / total)) for counts, total in rows for number in counts])
        side = cell * len(names)
        return table.resize((side, side), Image.Resampling.NEAREST)
    margin = 16 + int(max(font.getlength(name) for name in names))
    side = margin + cell * len(names)
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    for row, counts in enumerate(confusion):
        top, total = margin + row * cell, max(1, sum(counts))
        draw.text((8, top + cell // 2), names[row], fill="black", font=font, anchor="lm")
        for column, number in enumerate(counts):
            left, share = margin + column * cell, number / total
            shade = round(255 * (1 - share))
            draw.rectangle((left, top, left + cell - 2, top + cell - 2), fill=(shade, shade, 255))
            ink = "white" if share > 0.5 else "black"
            draw.text((left + cell // 2, top + cell // 2), str(number), fill=ink, font=font, anchor="mm")
    for column, name in enumerate(names):  # written upwards
        label = Image.new("RGB", (margin - 8, 16), "white")
        ImageDraw.Draw(label).text((0, 8), name, fill="black", font=font, anchor="lm")
        picture.paste(label.rotate(90, expand=True), (margin + column * cell + cell // 2 - 8, 0))
    return picture
