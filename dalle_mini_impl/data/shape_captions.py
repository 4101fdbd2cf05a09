"""Captions of shape scenes, and their inverse: the claims that a caption makes.

Every caption names all shapes of its scene by colour and shape, so that a picture with a shape too many is wrong, and
may also claim sizes, positions, relations and the background. Whatever `describe` can say, `parse_caption` reads.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from itertools import permutations

from dalle_mini_impl.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Background,
    Claim,
    Count,
    Direction,
    Exists,
    Pair,
    Position,
    Relation,
    Scene,
    Size,
    Thing,
    direction_of,
    place_of,
)

SIZE_WORDS: dict[Size, tuple[str, ...]] = {"small": ("small", "little"), "large": ("large", "big")}
DIRECTION_WORDS: dict[Direction, tuple[str, ...]] = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
POSITION_WORDS: dict[Position, tuple[str, ...]] = {
    "top left": ("in the top left corner", "at the top left"),
    "top right": ("in the top right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "center": ("in the center", "in the middle"),
}
_NUMBERS = ("one shape", "two shapes", "three shapes")
_SIZES = {word: name for name, words in SIZE_WORDS.items() for word in words}
_DIRECTIONS = {word: name for name, words in DIRECTION_WORDS.items() for word in words}
_POSITIONS = {word: name for name, words in POSITION_WORDS.items() for word in words}


def describe(scene: Scene, rng: random.Random, number: int = 3) -> list[str]:
    """Writes up to `number` different true captions of a scene; the first tells a relation if one is clear."""
    captions: dict[str, None] = {}
    chain = _relation_caption(scene, rng)
    if chain is not None:
        captions[chain] = None
    for _ in range(20):
        if len(captions) >= number:
            break
        related = _relation_caption(scene, rng) if chain is not None and rng.random() < 0.4 else None
        captions[related or _list_caption(scene, rng)] = None
    return list(captions)


def _phrase(thing: Thing, rng: random.Random, article: str, *, sized: bool, placed: bool = False) -> str:
    """Names a thing: article "a" (or "an"), "the" or none, size and position where asked for and known."""
    words = [rng.choice(SIZE_WORDS[thing.size])] if sized else []
    words += [thing.colour, str(thing.shape)]
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    position = place_of(thing) if placed else None
    if position is not None:
        words.append(rng.choice(POSITION_WORDS[position]))
    return " ".join([article, *words] if article else words)


def _with_background(text: str, scene: Scene, rng: random.Random) -> str:
    """Adds the background, before or after, to half of the captions."""
    chance = rng.random()
    if chance < 0.35:
        return f"{text} on a {scene.background} background"
    return f"on a {scene.background} background, {text}" if chance < 0.5 else text


def _list_caption(scene: Scene, rng: random.Random) -> str:
    """All things one after the other, in random order, sized or placed or plain."""
    things = rng.sample(scene.things, len(scene.things))
    sized, placed = rng.random() < 0.4, rng.random() < 0.4
    if placed:  # a position at the end could be read as that of all, so things without one go last
        things.sort(key=lambda thing: place_of(thing) is None)
    head = rng.choice(("", "", "", "there is ", "a picture of ", f"{_NUMBERS[len(things) - 1]}: "))
    bare = head.endswith(": ") or (not head and rng.random() < 0.25)
    phrases = [_phrase(thing, rng, "" if bare else "a", sized=sized, placed=placed) for thing in things]
    text = ", ".join(phrases) if bare else _join(phrases)
    return _with_background(head + text, scene, rng)


def _join(phrases: list[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def _relation_caption(scene: Scene, rng: random.Random) -> str | None:
    """Relations that hold all things together; None where there is one thing or they lie too near the diagonal.

    Two things are "A left of B" or "A, B right of it"; a third follows as "and C above the A".
    """
    orders = [order for order in permutations(scene.things) if len(order) > 1 and direction_of(order[0], order[1])]
    orders = [o for o in orders if len(o) == 2 or direction_of(o[2], o[0]) or direction_of(o[2], o[1])]
    if not orders:
        return None
    first, second, *third = rng.choice(orders)
    sized, bare = rng.random() < 0.35, rng.random() < 0.2
    one, two = (_phrase(thing, rng, "" if bare else "a", sized=sized) for thing in (first, second))
    there, back = (direction_of(*pair) for pair in ((first, second), (second, first)))
    assert there is not None and back is not None
    if bare or rng.random() < 0.3:
        text = f"{one}, {two} {rng.choice(DIRECTION_WORDS[back])} it"
    else:
        text = f"{rng.choice(('', '', 'there is '))}{one} {rng.choice(DIRECTION_WORDS[there])} {two}"
    if third:
        near, way = rng.choice([(t, d) for t in (first, second) if (d := direction_of(third[0], t))])
        last = _phrase(third[0], rng, "" if bare else "a", sized=sized)
        reference = _phrase(near, rng, "the", sized=False)
        text += f"{rng.choice((', ', ', and '))}{last} {rng.choice(DIRECTION_WORDS[way])} {reference}"
    return _with_background(text, scene, rng)


def _either(words: Iterable[str]) -> str:
    return "|".join(sorted((re.escape(word) for word in words), key=len, reverse=True))


_BACKGROUND = rf"on a (?P<background>{_either(BACKGROUNDS)}) background"
_BEFORE = re.compile(_BACKGROUND + r",? ")
_AFTER = re.compile(r",? " + _BACKGROUND + "$")
_HEAD = re.compile(rf"there (?:is|are) |a picture of |(?:{_either(_NUMBERS)}): ")
_THING = re.compile(
    rf"(?P<article>the |an? )?(?:(?P<size>{_either(_SIZES)}) )?"
    rf"(?P<colour>{_either(COLOURS)}) (?P<shape>{_either(SHAPES)})"
    rf"(?: (?P<position>{_either(_POSITIONS)}))?"
)
_LINK = re.compile(rf"(?: (?P<direction>{_either(_DIRECTIONS)}) (?P<it>it\b)?)?(?P<stop>, and |, | and |$)?")


def parse_caption(caption: str) -> list[Claim]:
    """Reads the claims of a caption: Exists of each thing, Relations, the Count and, if named, the Background.

    Case and extra spaces don't matter. Raises ValueError for a caption that `describe` can't have written.
    """
    text = " ".join(caption.lower().split()).rstrip(".")
    background = _BEFORE.match(text) or _AFTER.search(text)
    if background:
        text = text[: background.start()] + text[background.end() :]
    if head := _HEAD.match(text):
        text = text[head.end() :]
    things: list[Exists] = []
    relations: list[Relation] = []
    pending: tuple[Pair, Direction] | None = None
    position, open_end = 0, True
    while open_end:
        found = _THING.match(text, position)
        if found is None:
            raise ValueError(f"can't read {caption!r} as a caption of shapes: stuck at {text[position:]!r}")
        thing = _read_thing(found)
        pair = (thing.colour, thing.shape)
        if found["article"] != "the ":
            things.append(thing)
        elif pair not in [(other.colour, other.shape) for other in things] or pending is None:
            raise ValueError(f"{caption!r} speaks of {found[0]!r} before naming it")
        if pending is not None:
            relations.append(Relation(*pending, pair))
            pending = None
        link = _LINK.match(text, found.end())
        assert link is not None
        position = link.end()
        if link["direction"] is not None:
            direction = _DIRECTIONS[link["direction"]]
            if link["it"]:
                if len(things) < 2:
                    raise ValueError(f"{caption!r} says 'it' where only one shape is named")
                relations.append(Relation(pair, direction, (things[-2].colour, things[-2].shape)))
            else:
                pending = (pair, direction)
        open_end = position < len(text) or pending is not None
    claims: list[Claim] = [*things, *relations, Count(len(things))]
    return [*claims, Background(background["background"])] if background else claims


def _read_thing(found: re.Match[str]) -> Exists:
    shape = next(shape for shape in SHAPES if shape == found["shape"])
    size = _SIZES[found["size"]] if found["size"] else None
    return Exists(found["colour"], shape, size, _POSITIONS[found["position"]] if found["position"] else None)
