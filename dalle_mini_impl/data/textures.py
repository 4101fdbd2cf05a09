"""The made source `textures`: surfaces of wood, brick, marble and others, full of the detail that a plain VAE blurs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from dalle_mini_impl.data.records import Record

Scale = Literal["fine", "coarse"]
Field = npt.NDArray[np.float64]
"""(S, S): at each pixel where between the dark tone (0) and the light one (1) it is."""

VALIDATION_EVERY = 20
CELLS: dict[Scale, float] = {"fine": 11.0, "coarse": 5.0}
"""Rings, bricks, threads … along the side of a picture, give or take a fifth."""
COLOURS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "brown": ((92, 52, 24), (202, 150, 98)),
    "red": ((120, 22, 20), (226, 104, 84)),
    "yellow": ((168, 116, 20), (250, 226, 120)),
    "green": ((22, 74, 34), (150, 204, 110)),
    "blue": ((20, 42, 108), (128, 176, 236)),
    "purple": ((66, 28, 96), (196, 146, 226)),
    "grey": ((62, 62, 66), (206, 206, 204)),
    "white": ((176, 174, 168), (252, 251, 246)),
}
"""The dark and the light tone of each."""


@dataclass(frozen=True)
class Texture:
    """What a picture shows."""

    material: str
    colour: str
    scale: Scale

    @property
    def captions(self) -> tuple[str, ...]:
        """Two ways to say it."""
        noun = NOUNS[self.material]
        return f"{self.colour} {self.material} with {self.scale} {noun}", f"{self.scale} {self.colour} {self.material}"


def noise(rng: np.random.Generator, size: int, across: float, down: float) -> Field:
    """Smooth noise in about [0, 1] with so many cells across and down."""
    shape = (max(2, round(down) + 2), max(2, round(across) + 2))
    coarse = Image.fromarray(rng.random(shape).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)


def clouds(rng: np.random.Generator, size: int, cells: float) -> Field:
    """Noise of halving size and strength."""
    levels = [noise(rng, size, cells * 2**level, cells * 2**level) / 2**level for level in range(4)]
    total: Field = np.add.reduce(levels) / (2 - 2**-3)
    return total


def _wood(x: Field, y: Field, cells: float, rng: np.random.Generator) -> Field:
    size = len(x)
    rings = (x * cells + 1.5 * noise(rng, size, 3, 1.5)) % 1
    return 0.65 * rings**2 + 0.35 * noise(rng, size, 6 * cells, 3)


def _marble(x: Field, y: Field, cells: float, rng: np.random.Generator) -> Field:
    veins = np.abs(np.sin(math.pi * (0.4 * cells * (x + y) + 2.5 * clouds(rng, len(x), 0.6 * cells))))
    return veins**0.5


def _bricks(x: Field, y: Field, cells: float, rng: np.random.Generator) -> Field:
    row = np.floor(y * cells)
    along = x * cells / 2 + 0.5 * (row % 2)
    tones = rng.random((64, 64))[row.astype(int) % 64, np.floor(along).astype(int) % 64]
    is_mortar = ((y * cells) % 1 < 0.16) | (along % 1 < 0.08)
    brick = 0.15 + 0.45 * tones + 0.2 * noise(rng, len(x), 6 * cells, 6 * cells)
    return np.where(is_mortar, 0.95, brick)


def _fabric(x: Field, y: Field, cells: float, rng: np.random.Generator) -> Field:
    over = (np.floor(2 * cells * x) + np.floor(2 * cells * y)) % 2
    thread = np.where(over == 1, np.sin(math.pi * ((2 * cells * x) % 1)), np.sin(math.pi * ((2 * cells * y) % 1)))
    return 0.8 * thread + 0.2 * noise(rng, len(x), 4 * cells, 4 * cells)


def _sand(x: Field, y: Field, cells: float, rng: np.random.Generator) -> Field:
    ripples = 0.5 + 0.5 * np.sin(2 * math.pi * (0.5 * cells * y + noise(rng, len(x), 2, 2)))
    return 0.5 * ripples + 0.5 * rng.random(x.shape)


def _fur(x: Field, y: Field, cells: float, rng: np.random.Generator) -> Field:
    return np.clip(1.6 * noise(rng, len(x), 5 * cells, 0.7 * cells) - 0.3, 0, 1)


def _stripes(x: Field, y: Field, cells: float, rng: np.random.Generator) -> Field:
    return 0.8 * ((cells * x) % 1 < 0.5) + 0.2 * noise(rng, len(x), 3 * cells, 3 * cells)


def _tiles(x: Field, y: Field, cells: float, rng: np.random.Generator) -> Field:
    is_light = (np.floor(cells * x) + np.floor(cells * y)) % 2
    return 0.15 + 0.6 * is_light + 0.25 * clouds(rng, len(x), cells)


MATERIALS: dict[str, Callable[[Field, Field, float, np.random.Generator], Field]] = {
    "wood": _wood,
    "marble": _marble,
    "brickwork": _bricks,
    "fabric": _fabric,
    "sand": _sand,
    "fur": _fur,
    "stripes": _stripes,
    "tiles": _tiles,
}
NOUNS = {
    "wood": "grain",
    "marble": "veins",
    "brickwork": "bricks",
    "fabric": "threads",
    "sand": "ripples",
    "fur": "hair",
    "stripes": "bands",
    "tiles": "squares",
}


def render(texture: Texture, seed: tuple[int, ...], image_size: int) -> Image.Image:
    """Draws a texture, turned a little, as an RGB picture; a function of its arguments."""
    rng = np.random.default_rng(seed)
    place = (np.arange(image_size) + 0.5) / image_size
    across, down = np.meshgrid(place, place)
    angle = rng.uniform(-0.25, 0.25)
    x = np.cos(angle) * across - np.sin(angle) * down + 1 + rng.random()  # above 0, whatever the angle
    y = np.sin(angle) * across + np.cos(angle) * down + 1 + rng.random()
    cells = CELLS[texture.scale] * rng.uniform(0.8, 1.2)
    field = np.clip(MATERIALS[texture.material](x, y, cells, rng), 0, 1)[..., None]
    dark, light = (np.array(tone) for tone in COLOURS[texture.colour])
    return Image.fromarray((dark + (light - dark) * field).round().astype(np.uint8))


class TexturesSource:
    """Pictures of surfaces with two captions each; every 20th is for validation.

    count: number of pictures; picture i depends on (seed, i) alone, so a larger count keeps the first ones.
    image_size: side in pixels, at least 16.
    """

    kind = "textures"

    def __init__(self, count: int = 10_000, seed: int = 0, image_size: int = 64) -> None:
        if count < 1:
            raise ValueError(f"textures:count is {count}; it must be at least 1")
        if image_size < 16:
            raise ValueError(f"textures need pictures of at least 16 pixels, not {image_size}")
        self.count, self.seed, self.image_size = count, seed, image_size

    @property
    def describe(self) -> str:
        """What the source is, in a line; equal lines mean equal pictures and captions."""
        return f"textures:count={self.count},seed={self.seed} at {self.image_size} pixels"

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Record]:
        for index in range(self.count):
            texture = self.texture(index)
            yield Record(
                name=f"textures/{index:06d}",
                load=partial(render, texture, (self.seed, index, 1), self.image_size),
                captions=texture.captions,
                split="validation" if index % VALIDATION_EVERY == VALIDATION_EVERY - 1 else "train",
            )

    def texture(self, index: int) -> Texture:
        """What picture `index` shows."""
        rng = np.random.default_rng((self.seed, index, 0))
        material, colour = (list(names)[rng.integers(len(names))] for names in (MATERIALS, COLOURS))
        return Texture(material, colour, "fine" if rng.random() < 0.5 else "coarse")
