"""The made source `emoji`: every glyph of an installed colour-emoji font by name, and scenes composed of several.

Glyphs stand on a grid of 8-pixel cells, in two sizes: alone they fill the picture, in scenes half its side. On a VAE's
token grid of f8 (or finer) a glyph then has the same tokens wherever it stands, which small models learn far sooner.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path

from PIL import Image, ImageStat

from dalle_mini_impl.data.emoji_font import draw_cell, draw_glyph, find_font
from dalle_mini_impl.data.emoji_names import Glyph, all_glyphs, with_article
from dalle_mini_impl.data.records import Record, Split

SCENE_EMOJI = (
    "🐶🐱🐭🐰🦊🐻🐼🐨🐯🦁🐮🐷🐸🐵🐔🐧"
    "🦆🦅🦉🐺🐴🦄🐝🦋🐌🐞🕷🐢🐍🐙🦀🐡🐠🐬🐳🦈🐊🐘🐪🦒🐄🐎🐖🐑🐕🐈🐓🦜🦔🐁🐒🦓🦖🐉"  # animals
    "🌲🌳🌴🌵🌷🌹🌺🌻🌼🍀🍁🍄"  # plants
    "🍎🍏🍐🍊🍋🍌🍉🍇🍓🍒🍑🍍🥥🥝🍅🍆🥑🥕🌽🌶🍞🥐🧀🍔🍟🍕🌭🌮🍿🍦🍩🍪🎂🍰🧁🍫🍭🍯🍺☕🥚🍤"  # food and drink
    "🚗🚕🚙🚌🚑🚒🚜🚲🚂🚀✈🚁⛵🚢🛸🚓"  # vehicles
    "🏠🏰⛺🗼🗿🌋"  # places
    "🌞🌙⭐🌈☁❄🔥💧"  # sky and weather
    "⚽🏀🎈🎁🎸🎹🥁🎺🏆🎲🧸🪁"  # play
    "🔑💡⏰📷📱💻📺📚✏✂🔨☂👑👓🎩👟👢🕯🪑🛏🚪🧲🔔⚓💎💰🧦🎒🏺"  # things
    "❤🧡💛💚💙💜🖤"  # hearts
    "😀😂😍😎😢😡😱😴🤖👻👽💀🎃🤡💩👶🧙🎅"  # faces
)
"""Emoji that scenes are composed of: of one code point, and to be told at a quarter of the picture."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "blue": (150, 196, 246),
    "green": (166, 222, 160),
    "yellow": (252, 236, 150),
    "pink": (252, 196, 214),
    "purple": (208, 186, 242),
    "gray": (206, 206, 206),
    "black": (24, 24, 24),
}
CELL_PIXELS = 8
MAX_CELLS = 16
FILLED = 15 / 16
"""Share of its square's side that a glyph takes; the rest is its margin."""
HELD_OUT_PERCENT = 4
DARK = 85
"""Mean of the brightest channel, of 255, below which a glyph is never drawn on black."""

Side = tuple[int, int]
PLACES: dict[str, Side] = {
    "in the top left corner": (0, 0),
    "in the top right corner": (2, 0),
    "in the bottom left corner": (0, 2),
    "in the bottom right corner": (2, 2),
    "at the top": (1, 0),
    "at the bottom": (1, 2),
    "on the left": (0, 1),
    "on the right": (2, 1),
}
PARTS = {(0, 0): "top left", (1, 0): "top right", (0, 1): "bottom left", (1, 1): "bottom right"}


@dataclass(frozen=True)
class Placed:
    """A glyph in a picture: the upper left corner and the side of its square, in cells."""

    glyph: Glyph
    x: int
    y: int
    size: int


@dataclass(frozen=True)
class EmojiScene:
    """One picture of cells x cells: glyphs that don't overlap, on a plain background."""

    placed: tuple[Placed, ...]
    cells: int
    background: str = "white"


def render(scene: EmojiScene, font: Path, image_size: int) -> Image.Image:
    """Draws a scene: an RGB picture of image_size x image_size pixels."""
    canvas = Image.new("RGBA", (image_size, image_size), (*BACKGROUNDS[scene.background], 255))
    for item in scene.placed:
        left, top, square = (round(value * image_size / scene.cells) for value in (item.x, item.y, item.size))
        side = round(FILLED * square)
        margin = (square - side) // 2
        canvas.alpha_composite(draw_glyph(font, item.glyph.sequence, side), (left + margin, top + margin))
    return canvas.convert("RGB")


def cells_of(image_size: int) -> int:
    """Cells along the side of a picture: of 8 pixels each, an even number, and no more than 16 of them."""
    return min(MAX_CELLS, image_size // (2 * CELL_PIXELS) * 2)


class EmojiSource:
    """Pictures of emoji with their names, then scenes of 1 to 3 of them with captions that say what is where.

    scenes: number of composed scenes; scene i depends on (seed, i) alone.
    repeats: pictures of each emoji: by turns plain on white and on a colour.
    skin_tones: also show each variant with a skin tone, once.
    font: a colour-emoji font with bitmaps; by default Noto Color Emoji, wherever it is installed.
    Validation has the scenes that show a held-out pair of emoji together, which training never does. A glyph that
    training has never shown can't be drawn, so every single glyph is in training.
    Raises ValueError where the font or the package with the names is missing.
    """

    kind = "emoji"

    def __init__(
        self,
        scenes: int = 30_000,
        seed: int = 0,
        image_size: int = 64,
        font: str | None = None,
        repeats: int = 6,
        skin_tones: bool = True,
    ) -> None:
        if scenes < 0 or repeats < 0 or scenes + repeats == 0:
            raise ValueError(
                f"emoji:scenes is {scenes} and repeats {repeats}; both must be at least 0 and one of them 1"
            )
        if image_size < 4 * CELL_PIXELS:
            raise ValueError(f"emoji need pictures of at least {4 * CELL_PIXELS} pixels, not {image_size}")
        self.scenes, self.seed, self.image_size, self.repeats = scenes, seed, image_size, repeats
        self.cells = cells_of(image_size)
        self.font = find_font(font)
        drawable, self.dark = survey(self.font)
        self.base = [glyph for glyph in drawable if not glyph.toned]
        self.toned = [glyph for glyph in drawable if glyph.toned] if skin_tones and repeats else []
        self.actors = [glyph for glyph in self.base if glyph.sequence.rstrip("\ufe0f") in set(SCENE_EMOJI)]

    @property
    def describe(self) -> str:
        """What the source is, in a line; equal lines mean equal pictures and captions."""
        names = repr([(glyph.name, glyph.aliases) for glyph in (*self.base, *self.toned)])
        digest = hashlib.sha256(self.font.read_bytes() + names.encode()).hexdigest()[:12]
        return (
            f"emoji:scenes={self.scenes},seed={self.seed},repeats={self.repeats} at {self.image_size} pixels: "
            f"{len(self.base)} glyphs and {len(self.toned)} with skin tones of {self.font.name} ({digest})"
        )

    def __len__(self) -> int:
        return len(self.base) * self.repeats + len(self.toned) + self.scenes

    def __iter__(self) -> Iterator[Record]:
        for glyph in self.base:
            name = "-".join(f"{ord(letter):x}" for letter in glyph.sequence)
            for repeat in range(self.repeats):
                rng = random.Random(f"emoji/{self.seed}/{glyph.sequence}/{repeat}")
                scene = self._alone(glyph, repeat, rng)
                yield self._record(f"emoji/{name}/{repeat}", scene, single_captions(scene, rng), "train")
        for glyph in self.toned:
            name = "-".join(f"{ord(letter):x}" for letter in glyph.sequence)
            scene = EmojiScene((Placed(glyph, 0, 0, self.cells),), self.cells)
            phrase = glyph.name.replace(": ", " with ", 1)
            yield self._record(f"emoji/{name}", scene, (glyph.name, phrase), "train")
        for index in range(self.scenes):
            rng = random.Random(f"emoji/{self.seed}/scene/{index}")
            scene, captions = self.composed(rng)
            split: Split = "validation" if is_held_out(scene) else "train"
            yield self._record(f"emoji/scene/{index:06d}", scene, captions, split)

    def composed(self, rng: random.Random) -> tuple[EmojiScene, tuple[str, ...]]:
        """A scene of 1 to 3 different emoji in clear places, with 2 or 3 captions."""
        scene, exact, vague = self._scene(rng)
        captions = [*exact, *vague]
        chosen = rng.sample(captions, min(3, len(captions)))
        return scene, tuple(dict.fromkeys(_on_background(caption, scene, rng) for caption in chosen))

    def held_out_scenes(self, number: int, seed: int = 0) -> list[tuple[EmojiScene, str]]:
        """Draws scenes of held-out pairs, each with a caption that says where everything is; none is of training."""
        chosen: list[tuple[EmojiScene, str]] = []
        rng = random.Random(f"emoji/held out/{seed}")
        while len(chosen) < number:
            scene, exact, _ = self._scene(rng)
            if is_held_out(scene):
                chosen.append((scene, _on_background(rng.choice(exact), scene, rng)))
        return chosen

    def _scene(self, rng: random.Random) -> tuple[EmojiScene, list[str], list[str]]:
        """A scene, captions that say where everything is, and others that leave it open."""
        glyphs = rng.sample(self.actors, rng.choices((1, 2, 3), weights=(2, 5, 3))[0])
        background = rng.choice(self._backgrounds(*glyphs)) if rng.random() < 0.65 else "white"
        placed, exact, vague = (_one, _two, _three)[len(glyphs) - 1](glyphs, self.cells, rng)
        return EmojiScene(placed, self.cells, background), exact, vague

    def _alone(self, glyph: Glyph, repeat: int, rng: random.Random) -> EmojiScene:
        """A glyph that fills its picture, by turns on white and on a colour."""
        colours = [name for name in self._backgrounds(glyph) if name != "white"]
        background = rng.choice(colours) if repeat % 2 else "white"
        return EmojiScene((Placed(glyph, 0, 0, self.cells),), self.cells, background)

    def _backgrounds(self, *glyphs: Glyph) -> list[str]:
        """Those on which all of the glyphs can be seen."""
        dark = any(glyph.sequence in self.dark for glyph in glyphs)
        return [name for name in BACKGROUNDS if not (dark and name == "black")]

    def _record(self, name: str, scene: EmojiScene, captions: tuple[str, ...], split: Split) -> Record:
        return Record(
            name=name, load=partial(render, scene, self.font, self.image_size), captions=captions, split=split
        )


@lru_cache(maxsize=2)
def survey(font: Path) -> tuple[tuple[Glyph, ...], frozenset[str]]:
    """The emoji that a font can draw, in a fixed order, and the sequences of those too dark for black."""
    drawable, dark = [], set()
    for glyph in all_glyphs():
        cell = draw_cell(font, glyph.sequence)
        if cell is None:
            continue
        drawable.append(glyph)
        ink = ImageStat.Stat(cell.convert("RGB"), mask=cell.getchannel("A").point(lambda alpha: 255 * (alpha > 127)))
        if ink.count[0] and max(ink.mean) < DARK:
            dark.add(glyph.sequence)
    return tuple(drawable), frozenset(dark)


def is_held_out(scene: EmojiScene) -> bool:
    """Whether a scene shows two emoji that training never shows together."""
    names = sorted(item.glyph.sequence for item in scene.placed)
    digests = (hashlib.sha256("+".join(pair).encode()).digest() for pair in combinations(names, 2))
    return any(int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT for digest in digests)


def single_captions(scene: EmojiScene, rng: random.Random) -> tuple[str, ...]:
    """The name, with its article, in a phrase, and another name where there is one."""
    glyph = scene.placed[0].glyph
    name, thing = glyph.name, with_article(glyph.name)
    phrases = [f"{name} emoji", f"a picture of {thing}", f"an emoji of {thing}"]
    if glyph.is_flag:
        phrases = [f"the {name.replace(': ', ' of ')}"]
    others = [thing, rng.choice(phrases), *rng.sample(glyph.aliases, min(1, len(glyph.aliases)))]
    plain = name if scene.background == "white" else _on_background(name, scene, rng)
    return tuple(dict.fromkeys([plain, *(_on_background(caption, scene, rng) for caption in others)]))


def _on_background(caption: str, scene: EmojiScene, rng: random.Random) -> str:
    """Adds the background: always unless it is white, for which pictures stand that nothing is said of."""
    colour = scene.background
    if colour == "white" and rng.random() < 0.9:
        return caption
    light = colour not in ("white", "black") and rng.random() < 0.3
    return f"{caption} on a {'light ' if light else ''}{colour} background"


Composition = tuple[tuple[Placed, ...], list[str], list[str]]
"""What stands where, captions that say so, and captions that leave it open."""


def _one(glyphs: list[Glyph], cells: int, rng: random.Random) -> Composition:
    """One emoji at the picture's border or in a corner."""
    (glyph,) = glyphs
    half = cells // 2
    steps = (0, (cells - half) // 2, cells - half)
    place, (column, row) = rng.choice(list(PLACES.items()))
    thing = with_article(glyph.name)
    captions = [f"{thing} {place}", f"{glyph.name} {place}", f"{place}, {thing}"]
    return (Placed(glyph, steps[column], steps[row], half),), captions, []


def _two(glyphs: list[Glyph], cells: int, rng: random.Random) -> Composition:
    """Two emoji side by side or one above the other."""
    first, second = (with_article(glyph.name) for glyph in glyphs)
    half = cells // 2
    middle = rng.choice(((cells - half) // 2, (cells - half + 1) // 2))
    if rng.random() < 0.6:
        places = [(0, middle), (half, middle)]
        captions = [
            f"{first} to the left of {second}",
            f"{first} left of {second}",
            f"{second} to the right of {first}",
            f"{first} on the left and {second} on the right",
        ]
        vague = [f"{first} next to {second}"]
    else:
        places = [(middle, 0), (middle, half)]
        captions = [
            f"{first} above {second}",
            f"{second} below {first}",
            f"{second} under {first}",
            f"{first} at the top and {second} at the bottom",
        ]
        vague = []
    placed = tuple(Placed(glyph, *place, half) for glyph, place in zip(glyphs, places, strict=True))
    return placed, captions, [*vague, f"{first} and {second}"]


def _three(glyphs: list[Glyph], cells: int, rng: random.Random) -> Composition:
    """Three emoji in three quarters of the picture: two side by side, the third above or below one of them."""
    half = cells // 2
    row = rng.randint(0, 1)
    under = rng.randint(0, 1)
    corners = [(0, row), (1, row), (under, 1 - row)]
    left, right, third = (with_article(glyph.name) for glyph in glyphs)
    way = "below" if row == 0 else "above"
    anchor = glyphs[under].name
    captions = [
        f"{left} to the left of {right}, {third} {way} the {anchor}",
        f"{right} to the right of {left} and {third} {way} the {anchor}",
        ", ".join(f"{with_article(g.name)} in the {PARTS[c]} corner" for g, c in zip(glyphs, corners, strict=True)),
    ]
    placed = tuple(Placed(g, half * x, half * y, half) for g, (x, y) in zip(glyphs, corners, strict=True))
    return placed, captions, [f"{left}, {right} and {third}"]
