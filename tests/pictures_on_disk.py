"""Small pictures of one colour, for the tests of what reads them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 30, 20), "green": (10, 160, 40), "blue": (20, 40, 210), "grey": (128, 128, 128)}


def picture(colour: str, size: tuple[int, int] = (24, 24)) -> Image.Image:
    return Image.new("RGB", size, COLOURS[colour])


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def put(path: Path, colour: str, size: tuple[int, int] = (24, 24)) -> Path:
    """Writes a picture, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(colour, size).save(path)
    return path


def colour_of(pixels: np.ndarray[Any, Any] | Image.Image) -> str:
    """The known colour that a picture's mean is nearest to, if it is near at all."""
    mean = np.asarray(pixels, dtype=np.float64).reshape(-1, 3).mean(axis=0)
    distances = {name: float(np.abs(mean - np.array(value)).max()) for name, value in COLOURS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    assert distances[nearest] < 8, f"mean {mean} is none of {COLOURS}"
    return nearest
