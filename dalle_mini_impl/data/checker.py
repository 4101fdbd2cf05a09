"""The judge of `shapes` pictures: reads the scene back from the pixels and says which claims of a caption it fulfils.

Nothing here is learned. Each pixel is explained as a mixture of the background and the nearest palette colour; the
connected pixels of a thing are compared with each shape, drawn with the same area and centre of mass, which blur
hardly moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from dalle_mini_impl.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SUPERSAMPLING,
    Claim,
    Scene,
    Shape,
    Thing,
    draw_shape,
    holds,
)
from dalle_mini_impl.data.shape_captions import parse_caption

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

MIN_SIDE = 32
WORKING_SIDE = 64
"""Pictures of at least twice this side are averaged down to about it before they are read."""
MIN_COVERAGE = 0.4
"""Share of a palette colour above which a pixel belongs to a thing."""
MIN_AREA = 12 / 64**2
"""Things that cover less of the picture are noise."""
MIN_IOU = 0.75
"""A thing that overlaps its best template less has no shape."""
MAX_COLOUR_ERROR = 60.0
"""Root mean square distance in RGB beyond which a thing or a background has no name."""
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Verdict:
    """What was seen in a picture, and for each claim whether it holds."""

    scene: Scene
    claims: tuple[Claim, ...]
    holds: tuple[bool, ...]

    @property
    def all(self) -> bool:
        """Whether every claim holds."""
        return all(self.holds)


def check(picture: npt.NDArray[np.uint8], claims: Sequence[Claim]) -> Verdict:
    """Judges each claim about a picture, uint8 (S, S, 3) with S at least 32; raises ValueError for another array."""
    scene = read_scene(picture)
    return Verdict(scene, tuple(claims), tuple(holds(scene, claim) for claim in claims))


def check_caption(picture: npt.NDArray[np.uint8], caption: str) -> bool:
    """Whether every claim of a caption of shapes holds; raises ValueError for a caption that isn't one."""
    return check(picture, parse_caption(caption)).all


def read_scene(picture: npt.NDArray[np.uint8]) -> Scene:
    """Finds the background and the things of a picture, uint8 (S, S, 3); what fits no name is called "unknown"."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.shape[0] != picture.shape[1]:
        raise ValueError(f"a picture is {picture.dtype} {picture.shape}; the checker takes uint8 (S, S, 3)")
    if picture.shape[0] < MIN_SIDE:
        raise ValueError(f"a picture is {picture.shape[0]} pixels wide; the checker needs at least {MIN_SIDE}")
    if picture.shape[0] >= 2 * WORKING_SIDE:
        picture = np.asarray(Image.fromarray(picture).reduce(picture.shape[0] // WORKING_SIDE))
    pixels = picture.astype(np.float32)
    name, background = _background(pixels)
    coverage, error = _explain(pixels, background)
    best = error.argmin(axis=0)  # (S, S) index of colour
    covered = np.take_along_axis(coverage, best[None], axis=0)[0] > MIN_COVERAGE
    things: list[Thing] = []
    for mask in components(covered):
        for colour, part in _by_colour(mask, best, coverage):
            others = covered & ~mask
            thing = _read_thing(part, others, colour, coverage[colour], error[colour])
            if thing is not None:
                things.append(thing)
    return Scene(tuple(things), name)


def _background(pixels: Floats) -> tuple[str, Floats]:
    """Name and colour (3,) of the picture's border, where no thing lies."""
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3),
                             pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])  # fmt: skip
    colour = np.median(border, axis=0).astype(np.float32)
    distances = {name: float(np.linalg.norm(colour - rgb)) for name, rgb in BACKGROUNDS.items()}
    name = min(distances, key=distances.__getitem__)
    return (name if distances[name] <= MAX_COLOUR_ERROR else UNKNOWN), colour


def _explain(pixels: Floats, background: Floats) -> tuple[Floats, Floats]:
    """Each pixel as a mixture of background and one palette colour: its share and the squared error, (C, S, S) both."""
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    axes = palette - background  # (C, 3)
    offsets = pixels - background  # (S, S, 3)
    share = np.einsum("yxk,ck->cyx", offsets, axes) / (axes**2).sum(axis=1)[:, None, None]
    share = share.clip(0, 1)
    error = ((offsets[None] - share[..., None] * axes[:, None, None, :]) ** 2).sum(axis=3)
    return share, error


def _by_colour(mask: Bools, best: npt.NDArray[np.int64], coverage: Floats) -> list[tuple[int, Bools]]:
    """Cuts connected pixels into things of one colour each, where two things touch."""
    shares = np.take_along_axis(coverage, best[None], axis=0)[0]
    votes = np.bincount(best[mask & (shares > 0.8)], minlength=len(COLOURS))
    chosen = [int(c) for c in np.flatnonzero(votes > max(0.2 * votes.sum(), MIN_AREA * mask.size))]
    if len(chosen) < 2:
        return [(int(votes.argmax()), mask)]
    return [(colour, part) for colour in chosen for part in components(mask & (best == colour))]


def _read_thing(part: Bools, others: Bools, colour: int, coverage: Floats, error: Floats) -> Thing | None:
    """Measures one thing by its colour's coverage (S, S); None where it is too small to be one."""
    side = part.shape[0]
    region = _grow(part) & ~others
    soft = np.where(region, coverage, 0).astype(np.float32)
    if soft.sum() < MIN_AREA * side**2:
        return None
    crop, left, top = _crop(soft)
    sharp = _sharpen(crop)
    shape, iou, x, y, radius = max((_fit_shape(crop, sharp, shape) for shape in SHAPES), key=lambda fit: fit[1])
    named = float(np.sqrt(error[part].mean())) <= MAX_COLOUR_ERROR
    return Thing(
        colour=list(COLOURS)[colour] if named else UNKNOWN,
        shape=shape if iou >= MIN_IOU else None,
        x=(x + left) / side,
        y=(y + top) / side,
        radius=radius / side,
    )


def _fit_shape(crop: Floats, sharp: Floats, shape: Shape) -> tuple[Shape, float, float, float, float]:
    """Draws a shape with the area and centre of mass of `crop` and compares it with `sharp`, both (L, L).

    Returns shape, intersection over union, x, y and radius in pixels.
    """
    area, dx, dy = _moments_of_shape(shape)
    total, x, y = _moments(crop)
    radius = (total / area) ** 0.5
    x, y = x - dx * radius, y - dy * radius
    template = _sharpen(_draw_template(shape, crop.shape[0], x, y, radius))
    union = float(np.maximum(sharp, template).sum())
    return shape, float(np.minimum(sharp, template).sum()) / union if union else 0.0, x, y, radius


def _sharpen(soft: Floats) -> Floats:
    """Evens out noise, then makes edges hard again around the half-covered line, which mild blur leaves in place."""
    padded = np.pad(soft, 1)
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    even = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
    sharp: Floats = (3 * (even - 0.5) + 0.5).clip(0, 1)
    return sharp


def _crop(soft: Floats) -> tuple[Floats, int, int]:
    """A square around what isn't zero, with room on all sides, and where its corner lies: x, y (may be negative)."""
    ys, xs = np.nonzero(soft.any(axis=1))[0], np.nonzero(soft.any(axis=0))[0]
    side = int(1.4 * max(ys[-1] - ys[0], xs[-1] - xs[0])) + 6
    top, left = int(ys[0] + ys[-1] + 1 - side) // 2, int(xs[0] + xs[-1] + 1 - side) // 2
    padded = np.pad(soft, side)
    return padded[top + side : top + 2 * side, left + side : left + 2 * side], left, top


def _draw_template(shape: Shape, side: int, x: float, y: float, radius: float) -> Floats:
    """The coverage of a shape, (side, side) in [0, 1]."""
    canvas = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING), 0)
    x, y, radius = (value * SUPERSAMPLING - 0.5 for value in (x, y, radius))
    draw_shape(ImageDraw.Draw(canvas), shape, x, y, radius, fill=(255,), hole=(0,))
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / np.float32(255)


def _moments(soft: Floats) -> tuple[float, float, float]:
    """Area and centre of mass (x, y) in pixels from the corner."""
    total = float(soft.sum())
    middles = np.arange(soft.shape[0]) + 0.5
    return total, float(soft.sum(axis=0) @ middles) / total, float(soft.sum(axis=1) @ middles) / total


@lru_cache(maxsize=len(SHAPES))
def _moments_of_shape(shape: Shape) -> tuple[float, float, float]:
    """Area and centre of mass of a shape of radius 1 around (0, 0)."""
    radius = 64.0
    area, x, y = _moments(_draw_template(shape, 130, 65, 65, radius))
    return area / radius**2, (x - 65) / radius, (y - 65) / radius


def _grow(mask: Bools) -> Bools:
    """The mask and its eight neighbours."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def components(mask: Bools) -> list[Bools]:
    """The 8-connected parts of a mask (H, W), each a mask, in the order of their first pixels.

    Union-find over the horizontal runs of the mask, of which there are few.
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    runs = list(zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True))
    parent = list(range(len(runs)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    first_above = 0
    for this, (row, start, stop) in enumerate(runs):
        while runs[first_above][0] < row - 1:
            first_above += 1
        above = first_above
        while runs[above][0] == row - 1:
            if runs[above][1] <= stop and runs[above][2] >= start:
                one, two = sorted((root(above), root(this)))
                parent[two] = one
            above += 1
    parts: dict[int, Bools] = {}
    for this, (row, start, stop) in enumerate(runs):
        parts.setdefault(root(this), np.zeros_like(mask))[row, start:stop] = True
    return list(parts.values())
