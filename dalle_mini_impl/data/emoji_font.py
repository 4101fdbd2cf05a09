"""Colour-emoji glyphs: finding the installed font and drawing a sequence of code points as one picture."""

from __future__ import annotations

import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

FONT_NAME = "NotoColorEmoji.ttf"
FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "/opt/homebrew/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "~/Library/Fonts",
)
BITMAP_SIZE = 109
"""The one size in which Noto Color Emoji has bitmaps, 136 x 128 pixels each."""
CELL = 136
MAX_WIDTH = 1.25 * CELL
"""Anything wider is several glyphs side by side: the font has no one glyph for the sequence."""
VARIATION_SELECTOR = "\N{VARIATION SELECTOR-16}"
UNASSIGNED = "\U0003fffd"


def find_font(path: str | Path | None = None) -> Path:
    """The colour-emoji font: `path` if given, else Noto Color Emoji where fontconfig or the usual folders have it.

    Raises ValueError that tells how to install one.
    """
    if path is not None:
        given = Path(path).expanduser()
        if not given.is_file():
            raise ValueError(f"emoji:font is {str(path)!r}, which is no file; leave it out to use the installed font")
        return given
    if shutil.which("fc-match"):
        command = ["fc-match", "-f", "%{file}", "Noto Color Emoji"]
        found = Path(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())
        if found.name == FONT_NAME and found.is_file():
            return found
    for folder in FOLDERS:
        for candidate in sorted(Path(folder).expanduser().rglob(FONT_NAME)):
            return candidate
    raise ValueError(
        f"no {FONT_NAME} on this machine: install a colour-emoji font (Debian and Ubuntu: "
        "apt install fonts-noto-color-emoji), or name the file with emoji:font=FILE"
    )


@lru_cache(maxsize=2)
def _open(path: Path) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(str(path), BITMAP_SIZE)
    except OSError as error:
        raise ValueError(
            f"{path} can't be used: {error}; it must be a font with bitmaps of size {BITMAP_SIZE}"
        ) from None


def draw_cell(path: Path, sequence: str) -> Image.Image | None:
    """Draws a sequence as one glyph in the middle of a clear CELL x CELL picture, RGBA.

    None where the font draws nothing, several glyphs or its sign for a missing one. Sequences that are joined
    (families, professions, flags, skin tones) come out only where Pillow has the raqm library.
    """
    font = _open(path)
    if not features.check("raqm"):
        sequence = sequence.replace(VARIATION_SELECTOR, "")
    ink = _draw(font, sequence)
    if ink is None or (ink.size, ink.tobytes()) == _missing_sign(path):
        return None
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(ink, ((CELL - ink.width) // 2, (CELL - ink.height) // 2))
    return cell


@lru_cache(maxsize=2)
def _missing_sign(path: Path) -> tuple[tuple[int, int], bytes] | None:
    """Size and pixels of what a font draws for a code point that it hasn't got, if anything."""
    sign = _draw(_open(path), UNASSIGNED)
    return None if sign is None else (sign.size, sign.tobytes())


def _draw(font: ImageFont.FreeTypeFont, sequence: str) -> Image.Image | None:
    """The ink of a sequence, cropped; None where there is none or it is wider than one glyph."""
    if font.getlength(sequence) > MAX_WIDTH:
        return None
    canvas = Image.new("RGBA", (2 * CELL, 2 * CELL))
    ImageDraw.Draw(canvas).text((CELL // 2, CELL // 2), sequence, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    return None if box is None or box[2] - box[0] > CELL else canvas.crop(box)


@lru_cache(maxsize=4096)
def draw_glyph(path: Path, sequence: str, side: int) -> Image.Image:
    """A glyph as a clear side x side RGBA picture; raises ValueError where the font hasn't got it."""
    cell = draw_cell(path, sequence)
    if cell is None:
        raise ValueError(f"{path.name} has no glyph for {sequence!r}")
    return cell.resize((side, side), Image.Resampling.LANCZOS)
