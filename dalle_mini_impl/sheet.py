"""Pictures on disk: contact sheets with captions and scores, reconstruction sheets, PNGs that carry their settings."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from dalle_mini_impl.files import naming

Row = tuple[str, Sequence[tuple[Image.Image, str]]]
"""A title and the pictures under it, each with a label (may be empty)."""

CELL_PX, PADDING_PX, TITLE_PX, LABEL_PX = 128, 8, 16, 12
METADATA_KEY = "dalle_mini"
_SHEET = "sheet"
_TALLEST = 1.6  # height of a sheet as a multiple of its width, beyond which it gets another panel
_PAPER, _INK, _FAINT = "white", "#202020", "#707070"


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pictures (n, 3, S, S) float in [0, 1] as PIL images."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"pictures have shape {tuple(images.shape)}; expected (n, 3, S, S)")
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)  # (n, S, S, 3)
    return [Image.fromarray(picture) for picture in pixels.cpu().numpy()]


def contact_sheet(rows: Sequence[Row], *, cell_px: int = CELL_PX, columns: int = 8) -> Image.Image:
    """One picture of many: row by row a title, then its pictures with their labels below, `columns` to a line.

    Pictures are fitted into cells of cell_px. Text that is too long for its place is cut with an ellipsis. Many rows
    stand in several panels, to be read one after the other, so that the sheet fits a screen better than a ribbon does.
    """
    if cell_px < 1 or columns < 1:
        raise ValueError(f"a sheet needs cells of 1 px and 1 column, not {cell_px} and {columns}")
    for num_panels in range(1, len(rows) + 2):
        length = -(-len(rows) // num_panels) or 1
        panels = [_panel(rows[first : first + length], cell_px, columns) for first in range(0, len(rows) or 1, length)]
        width, height = sum(panel.width for panel in panels), max(panel.height for panel in panels)
        if height <= _TALLEST * width or length == 1:
            break
    sheet = Image.new("RGB", (width, height), _PAPER)
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width
    return sheet


def _panel(rows: Sequence[Row], cell_px: int, columns: int) -> Image.Image:
    """Rows below each other."""
    step = cell_px + PADDING_PX
    used = min(columns, max((len(pictures) for _, pictures in rows), default=1) or 1)
    width = PADDING_PX + used * step
    height = PADDING_PX + sum(_row_height(row, step, columns) for row in rows)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = PADDING_PX
    for title, pictures in rows:
        _write(draw, (PADDING_PX, top), title, TITLE_PX, width - 2 * PADDING_PX, _INK)
        for index, (picture, label) in enumerate(pictures):
            x = PADDING_PX + (index % columns) * step
            y = top + _title_height(title) + (index // columns) * (step + _label_height(pictures))
            fitted = _fit(picture, cell_px)
            sheet.paste(fitted, (x + (cell_px - fitted.width) // 2, y + (cell_px - fitted.height) // 2))
            _write(draw, (x, y + cell_px + 1), label, LABEL_PX, cell_px, _FAINT)
        top += _row_height((title, pictures), step, columns)
    return sheet


def reconstruction_sheet(originals: Tensor, reconstructions: Tensor, *, columns: int = 8) -> Image.Image:
    """Originals (n, 3, S, S) in [0, 1] with their reconstructions right below them."""
    if originals.shape != reconstructions.shape:
        raise ValueError(
            f"{tuple(originals.shape)} originals don't match {tuple(reconstructions.shape)} reconstructions"
        )
    return comparison_sheet({"originals": originals, "reconstructions": reconstructions}, columns=columns)


def comparison_sheet(versions: Mapping[str, Tensor], *, columns: int = 8, cell_px: int = CELL_PX) -> Image.Image:
    """Versions of the same pictures, (n, 3, S, S) in [0, 1] each, right below each other under their titles."""
    shapes = {title: tuple(images.shape) for title, images in versions.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"versions of pictures must be of one shape, not {shapes}")
    rows: list[Row] = []
    for first in range(0, next(iter(shapes.values()))[0], columns):
        for title, images in versions.items():
            rows.append((title, [(picture, "") for picture in to_pil(images[first : first + columns])]))
    return _panel(rows, cell_px, columns)  # never with originals in one panel and reconstructions in the next


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, Any]) -> None:
    """Writes a PNG with JSON metadata inside it, as a text chunk that `read_metadata` gives back."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False))
    with naming(Path(path)):
        image.save(path, format="PNG", pnginfo=info)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `save_png` put into a PNG; ValueError naming the file where there is none."""
    with Image.open(path) as image:
        text = image.info.get(METADATA_KEY)
    if not isinstance(text, str):
        raise ValueError(f"{path} carries no settings: it was not drawn by dalle_mini_impl, or was saved again since")
    try:
        metadata = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the settings inside {path} are not valid JSON: {error}") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"the settings inside {path} are no JSON object")
    return metadata


def save_sheet(sheet: Image.Image, path: str | Path) -> None:
    """Writes a sheet as a PNG that `is_sheet` recognises."""
    save_png(sheet, path, {"kind": _SHEET})


def is_sheet(path: str | Path) -> bool:
    """Whether a file is a sheet of pictures written by `save_sheet`, rather than a picture."""
    try:
        return read_metadata(path).get("kind") == _SHEET
    except (OSError, ValueError, Image.DecompressionBombError):
        return False


def slug(text: str, max_bytes: int = 60) -> str:
    """A safe part of a file name from any text: letters and digits of any script, "-" for everything else."""
    words = unicodedata.normalize("NFC", text).lower()
    joined = "".join(character if character.isalnum() else " " for character in words)
    cut = "-".join(joined.split()).encode()[:max_bytes].decode(errors="ignore")
    return cut.strip("-") or "prompt"


def _fit(picture: Image.Image, cell_px: int) -> Image.Image:
    """The picture as large as fits into a square cell."""
    scale = cell_px / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _title_height(title: str) -> int:
    return TITLE_PX + PADDING_PX if title else 0


def _label_height(pictures: Sequence[tuple[Image.Image, str]]) -> int:
    return LABEL_PX + 4 if any(label for _, label in pictures) else 0


def _row_height(row: Row, step: int, columns: int) -> int:
    title, pictures = row
    lines = -(-len(pictures) // columns)
    return _title_height(title) + lines * (step + _label_height(pictures))


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, width: int, ink: str) -> None:
    """Writes one line of text, cut to a width in pixels."""
    font = ImageFont.load_default(size)
    line = " ".join(text.split())[:1000]
    if draw.textlength(line, font=font) > width:
        while line and draw.textlength(line + "…", font=font) > width:
            line = line[:-1]
        line += "…"
    draw.text(place, line, fill=ink, font=font)
