"""Pictures of any mode, size and state of repair to plain RGB squares."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image

from dalle_mini_impl.config import DataConfig, Fit

Reason = Literal["unreadable", "bomb", "tiny", "empty_caption"]

_ENDINGS = "jpg jpeg jpe jfif png apng gif webp bmp dib tif tiff ppm pgm pbm pnm jp2 avif tga ico heic heif jxl"
EXTENSIONS = frozenset(f".{ending}" for ending in _ENDINGS.split())
"""File name endings, in lower case, that mark a picture; one that Pillow can't read without a plugin is told of."""

_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_header_lock = threading.Lock()


class PictureError(Exception):
    """A picture that can't be used; `open_picture` gives the reasons "unreadable", "bomb" and "tiny"."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail


def open_picture(data: bytes | str | Path, config: DataConfig) -> Image.Image:
    """Opens and decodes a picture (its first frame), in whatever mode the file has.

    Raises PictureError; too large ("bomb") and too small ("tiny") are told from the header, before decoding.
    """
    try:
        if isinstance(data, bytes) and not data:
            raise PictureError("unreadable", "no bytes")
        with _no_pixel_limit():
            image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        with image:
            _check_size(image.size, config)
            image.load()
        return image
    except PictureError:
        raise
    # Decoders raise whatever a broken file leads them to: OSError, SyntaxError, struct.error, ValueError, IndexError …
    except Exception as error:
        raise PictureError("unreadable", f"{type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as upright 8-bit RGB: its EXIF rotation applied, transparency on white, deep modes scaled."""
    image = _upright(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith(("I", "F")):
        return _deep_to_grey(image).convert("RGB")
    if image.has_transparency_data:
        layers = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", layers.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layers).convert("RGB")
    return image.convert("RGB")


def to_square(image: Image.Image, size: int, fit: Fit) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """An RGB picture as a uint8 array (size, size, 3): centre crop, white borders, or stretched; antialiased."""
    assert image.mode == "RGB", image.mode
    width, height = image.size
    if fit == "pad":
        longest = max(width, height)
        inner = (max(1, round(width * size / longest)), max(1, round(height * size / longest)))
        square = Image.new("RGB", (size, size), (255, 255, 255))
        square.paste(_resize(image, inner, None), ((size - inner[0]) // 2, (size - inner[1]) // 2))
        return np.array(square)
    box = None
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    return np.array(_resize(image, (size, size), box))


def _resize(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None) -> Image.Image:
    """Lanczos; from far above the target by a cheap box filter first, at 3 times the size still exact to the eye."""
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def _check_size(size: tuple[int, int], config: DataConfig) -> None:
    """Raises PictureError for a picture beyond the limits of the config."""
    width, height = size
    if width * height > config.max_megapixels * 1e6:
        limit = f"data.max_megapixels {config.max_megapixels:g}"
        raise PictureError("bomb", f"{width}x{height} pixels are more than {limit}")
    if min(width, height) < config.min_side_px:
        raise PictureError("tiny", f"{width}x{height} pixels are less than data.min_side_px {config.min_side_px}")


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Pillow's warnings about odd files to itself, in every thread: what can't be used is reported by name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


@contextmanager
def _no_pixel_limit() -> Iterator[None]:
    """Lifts Pillow's process-wide pixel limit for as long as a header is read: ours, from the config, comes next."""
    with _header_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; a broken EXIF block says nothing."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the parser raises whatever broken metadata leads it to; the pixels are good all the same
        return image
    method = _ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _deep_to_grey(image: Image.Image) -> Image.Image:
    """A 16-bit, 32-bit or float picture as 8-bit grey, by the range of its type or, where that is open, its values."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    highest = float(values.max(initial=0.0))
    if image.mode.startswith("I;16") or (image.mode == "I" and highest <= 65_535):
        values /= 257.0
    elif image.mode == "I":
        values /= (2**31 - 1) / 255.0
    elif highest <= 1.0:
        values *= 255.0
    elif highest > 255.0:
        values *= 255.0 / (65_535.0 if highest <= 65_535 else highest)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
