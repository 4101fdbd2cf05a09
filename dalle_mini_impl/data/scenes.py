"""Scenes of one to three coloured shapes: the ground truth of the made source `shapes`, how it is drawn, what is true.

All coordinates are in units of the picture's side, x to the right and y down. A shape's `radius` is half the longer
side of its bounding box and (x, y) is the middle of that box, so both can be measured from pixels.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image, ImageDraw

Shape = Literal["circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring"]
Size = Literal["small", "large"]
Direction = Literal["left", "right", "above", "below"]
Position = Literal[
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"
]  # fmt: skip

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 38),
    "orange": (248, 136, 20),
    "yellow": (250, 218, 30),
    "green": (28, 160, 62),
    "cyan": (36, 196, 222),
    "blue": (38, 76, 224),
    "purple": (138, 44, 190),
    "pink": (246, 116, 186),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (10, 10, 10),
    "gray": (146, 146, 146),
    "beige": (244, 226, 192),
    "light blue": (192, 218, 250),
    "light green": (190, 236, 186),
}
RADII: dict[Size, tuple[float, float]] = {"small": (7.5 / 64, 9 / 64), "large": (12 / 64, 15 / 64)}
SIZE_LIMIT = 10.5 / 64
"""Radius that parts small shapes from large ones."""
BORDER = 2 / 64
GAP = 3 / 64
SUPERSAMPLING = 4
HOLE = 0.55
"""Radius of a ring's hole as a share of its own."""

NUMBER_WEIGHTS = (3.0, 4.0, 3.0)
"""How often a scene has one, two and three shapes."""

Pair = tuple[str, Shape]
HELD_OUT_PAIRS: frozenset[Pair] = frozenset(
    (colour, SHAPES[(3 * i + 2) % len(SHAPES)]) for i, colour in enumerate(COLOURS)
)
"""Colour-shape pairs that no training scene holds: one of each colour and one of each shape, 8 of 64."""
ALL_PAIRS: tuple[Pair, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
SEEN_PAIRS: tuple[Pair, ...] = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; shape is None where a checker couldn't tell it."""

    colour: str
    shape: Shape | None
    x: float
    y: float
    radius: float

    @property
    def size(self) -> Size:
        """ "small" or "large"."""
        return "small" if self.radius < SIZE_LIMIT else "large"


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows."""

    things: tuple[Thing, ...]
    background: str


@dataclass(frozen=True)
class Exists:
    """There is a shape of this colour, and of this size and at this place where they are given."""

    colour: str
    shape: Shape
    size: Size | None = None
    position: Position | None = None


@dataclass(frozen=True)
class Relation:
    """The first shape is to the `direction` of the second: "left" reads "subject to the left of other"."""

    subject: Pair
    direction: Direction
    other: Pair


@dataclass(frozen=True)
class Count:
    """The picture shows this many shapes and no more."""

    number: int


@dataclass(frozen=True)
class Background:
    """The colour behind the shapes."""

    name: str


Claim = Exists | Relation | Count | Background


def holds(scene: Scene, claim: Claim) -> bool:
    """Whether a claim is true of a scene, by limits a little wider than those by which captions claim anything."""
    match claim:
        case Count(number):
            return len(scene.things) == number
        case Background(name):
            return scene.background == name
        case Exists(colour, shape, size, position):
            return any(
                size in (None, thing.size) and (position is None or is_at(thing, position, slack=0.06))
                for thing in scene.things
                if (thing.colour, thing.shape) == (colour, shape)
            )
        case Relation(subject, direction, other):
            return any(
                is_beside(one, direction, two, ratio=0.8)
                for one in scene.things
                if (one.colour, one.shape) == subject
                for two in scene.things
                if (two.colour, two.shape) == other
            )


def is_at(thing: Thing, position: Position, slack: float = 0.0) -> bool:
    """Whether a thing lies in the named part: a side third, a corner of two of them, or the middle of the picture."""
    if position == "center":
        return max(abs(thing.x - 0.5), abs(thing.y - 0.5)) <= 0.1 + slack
    sides = {"left": thing.x, "right": 1 - thing.x, "top": thing.y, "bottom": 1 - thing.y}
    return all(sides[word] <= 0.36 + slack for word in position.split())


def place_of(thing: Thing) -> Position | None:
    """The one position that a caption may claim of a thing, or None where it lies between two."""
    words = []
    for value, low, high in ((thing.y, "top", "bottom"), (thing.x, "left", "right")):
        if value <= 0.36:
            words.append(low)
        elif value >= 0.64:
            words.append(high)
        elif abs(value - 0.5) > 0.1:
            return None
    name = " ".join(words) or "center"
    return next(position for position in get_args(Position) if position == name)


def is_beside(subject: Thing, direction: Direction, other: Thing, ratio: float) -> bool:
    """Whether subject lies in a direction of other: clear of it, and at least `ratio` times as far as to the side."""
    dx, dy = subject.x - other.x, subject.y - other.y
    along, across = {"left": (-dx, dy), "right": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[direction]
    return along >= 0.12 and along >= ratio * abs(across)


def direction_of(subject: Thing, other: Thing) -> Direction | None:
    """The direction that a caption may claim of subject, seen from other; None where it is too near the diagonal."""
    return next((way for way in get_args(Direction) if is_beside(subject, way, other, ratio=1.25)), None)


def sample_scene(
    rng: random.Random, *, unseen: bool = False, weights: tuple[float, float, float] = NUMBER_WEIGHTS
) -> Scene:
    """Draws a scene: 1 to 3 shapes of different colour-shape pairs that keep clear of each other and of the border.

    unseen: take at least one pair of HELD_OUT_PAIRS; else none. weights: how often it has 1, 2, 3 shapes.
    """
    number = rng.choices((1, 2, 3), weights=weights)[0]
    if unseen:
        first = rng.choice(sorted(HELD_OUT_PAIRS))
        pairs = [first, *rng.sample([pair for pair in ALL_PAIRS if pair != first], number - 1)]
        rng.shuffle(pairs)
    else:
        pairs = rng.sample(SEEN_PAIRS, number)
    background = rng.choice(tuple(BACKGROUNDS))
    while True:
        things = _place(rng, pairs)
        if things is not None:
            return Scene(things, background)


def _place(rng: random.Random, pairs: list[Pair]) -> tuple[Thing, ...] | None:
    """One try to place shapes of random sizes; None where they don't fit."""
    things: list[Thing] = []
    for colour, shape in pairs:
        radius = rng.uniform(*RADII[rng.choice(("small", "large"))])
        low, high = BORDER + radius, 1 - BORDER - radius
        for _ in range(12):
            x, y = rng.uniform(low, high), rng.uniform(low, high)
            if all(max(abs(x - t.x), abs(y - t.y)) >= radius + t.radius + GAP for t in things):
                things.append(Thing(colour, shape, x, y, radius))
                break
        else:
            return None
    return tuple(things)


def _fit(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Moves and scales an outline so that the longer side of its box spans -1 … 1 and the box is centred."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    half = max(max(xs) - min(xs), max(ys) - min(ys)) / 2
    x0, y0 = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    return [((x - x0) / half, (y - y0) / half) for x, y in points]


def _heart_point(t: float) -> tuple[float, float]:
    return 16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))


_STAR = [(1.0 if k % 2 == 0 else 0.44, math.pi * (k / 5 - 0.5)) for k in range(10)]
_ARM = 0.34
_OUTLINES: dict[Shape, list[tuple[float, float]]] = {
    "square": _fit([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": _fit([(-1, 1), (0, -0.8), (1, 1)]),
    "star": _fit([(r * math.cos(a), r * math.sin(a)) for r, a in _STAR]),
    "heart": _fit([_heart_point(2 * math.pi * k / 48) for k in range(48)]),
    "diamond": _fit([(0, -1), (0.8, 0), (0, 1), (-0.8, 0)]),
    "cross": _fit(
        [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
         (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)]
    ),
}  # fmt: skip


def draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: Shape,
    x: float,
    y: float,
    radius: float,
    fill: tuple[int, ...],
    hole: tuple[int, ...],
) -> None:
    """Draws a shape; x, y and radius in pixels of the canvas, hole is the colour inside a ring."""
    if shape in ("circle", "ring"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        if shape == "ring":
            inner = radius * HOLE
            draw.ellipse((x - inner, y - inner, x + inner, y + inner), fill=hole)
    else:
        draw.polygon([(x + radius * u, y + radius * v) for u, v in _OUTLINES[shape]], fill=fill)


def render(scene: Scene, image_size: int = 64) -> Image.Image:
    """Draws a scene, antialiased: an RGB picture of image_size x image_size pixels."""
    background = BACKGROUNDS[scene.background]
    side = image_size * SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        assert thing.shape is not None
        # Pillow's coordinates are those of pixel centres, half a pixel off the canvas's own.
        x, y, radius = thing.x * side - 0.5, thing.y * side - 0.5, thing.radius * side - 0.5
        draw_shape(draw, thing.shape, x, y, radius, COLOURS[thing.colour], background)
    return canvas.reduce(SUPERSAMPLING)
