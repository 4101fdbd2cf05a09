"""Shapes: captions are true and readable, held-out pairs stay out of training, the checker sees what was drawn."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.checker import check, check_caption, components, read_scene
from dalle_mini_impl.data.scenes import (
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    Background,
    Claim,
    Count,
    Exists,
    Position,
    Relation,
    Scene,
    Thing,
    holds,
    render,
    sample_scene,
)
from dalle_mini_impl.data.shape_captions import describe, parse_caption
from dalle_mini_impl.data.shapes import ShapesSource, held_out_prompts, held_out_scenes
from dalle_mini_impl.data.sources import open_source


def scenes(number: int, *, unseen: bool = False) -> list[tuple[Scene, list[str]]]:
    made = []
    for index in range(number):
        rng = random.Random(f"test/{index}")
        scene = sample_scene(rng, unseen=unseen)
        made.append((scene, describe(scene, rng, number=4)))
    return made


def pixels(scene: Scene, size: int = 64) -> np.ndarray:
    return np.asarray(render(scene, size))


def test_no_caption_is_false_or_unreadable() -> None:
    for scene, captions in scenes(400) + scenes(200, unseen=True):
        assert len(captions) >= 2
        for caption in captions:
            claims = parse_caption(caption)
            assert all(holds(scene, claim) for claim in claims), (caption, scene)
            assert Count(len(scene.things)) in claims
            named = {(c.colour, c.shape) for c in claims if isinstance(c, Exists)}
            assert named == {(t.colour, t.shape) for t in scene.things}, "a caption must name every shape"


def test_parsing_loses_no_claim() -> None:
    assert parse_caption("a small red circle to the left of a Big blue square on a light blue background") == [
        Exists("red", "circle", "small"),
        Exists("blue", "square", "large"),
        Relation(("red", "circle"), "left", ("blue", "square")),
        Count(2),
        Background("light blue"),
    ]
    assert parse_caption("red circle, blue square below it, green star above the red circle")[3:] == [
        Relation(("blue", "square"), "below", ("red", "circle")),
        Relation(("green", "star"), "above", ("red", "circle")),
        Count(3),
    ]
    assert parse_caption("on a black background, one shape: orange ring in the top left corner") == [
        Exists("orange", "ring", None, "top left"),
        Count(1),
        Background("black"),
    ]


@pytest.mark.parametrize(
    "caption",
    ["", "a dog", "a red circle and", "a red circle below the blue square", "a red circle below it", "a red circle!!"],
)
def test_captions_of_other_kinds_are_refused_by_name(caption: str) -> None:
    with pytest.raises(ValueError, match=r"can't read|before naming|'it'"):
        parse_caption(caption)


def test_held_out_pairs_never_reach_training_and_cost_no_colour_or_shape() -> None:
    assert len(HELD_OUT_PAIRS) == 8
    assert {colour for colour, _ in HELD_OUT_PAIRS} == set(COLOURS)
    assert {shape for _, shape in HELD_OUT_PAIRS} == set(SHAPES)
    source = ShapesSource(count=1500)
    drawn = {(t.colour, t.shape) for index in range(1500) for t in source.scene(index)[0].things}
    assert len(drawn) == 64 - 8 and not drawn & HELD_OUT_PAIRS
    for kind, expected in (("seen", False), ("unseen", True)):
        for scene, caption in held_out_scenes(100, 3, kind):  # type: ignore[arg-type]
            assert any((t.colour, t.shape) in HELD_OUT_PAIRS for t in scene.things) is expected
            assert all(holds(scene, claim) for claim in parse_caption(caption))
    with pytest.raises(ValueError, match="'new'"):
        held_out_prompts(1, pairs="new")  # type: ignore[arg-type]


def test_pictures_of_evaluation_are_no_pictures_of_training() -> None:
    source = ShapesSource(count=300)
    trained = {source.scene(index)[0] for index in range(300)}
    assert not trained & {scene for scene, _ in held_out_scenes(300)}


def test_a_larger_count_keeps_the_first_pictures_and_another_seed_none() -> None:
    few, many, other = list(ShapesSource(count=21)), list(ShapesSource(count=40)), list(ShapesSource(count=21, seed=1))
    assert [(r.name, r.captions, r.split) for r in few] == [(r.name, r.captions, r.split) for r in many[:21]]
    assert few[7].load().tobytes() == many[7].load().tobytes() == few[7].load().tobytes()
    assert all(one.load().tobytes() != two.load().tobytes() for one, two in zip(few, other, strict=True))
    assert [r.split for r in few].count("validation") == 1 and few[19].split == "validation"
    assert few[0].load().size == (64, 64) and all(2 <= len(r.captions) <= 4 for r in many)


def test_scenes_can_be_asked_for_by_their_number_of_shapes() -> None:
    source = ShapesSource(count=600, weights="0/1/3")
    numbers = Counter(len(source.scene(index)[0].things) for index in range(600))
    assert numbers[1] == 0 and numbers[2] + numbers[3] == 600 and 400 <= numbers[3] <= 500
    assert source.describe == "shapes:count=600,seed=0,weights=0/1/3 at 64 pixels"
    assert ShapesSource(count=600).describe == ShapesSource(count=600, weights="3/4/3").describe
    opened = open_source("shapes:count=7,weights=0/0/1", DataConfig(image_size=32))
    assert all(len(parse_caption(caption)) > 3 for record in opened for caption in record.captions)


@pytest.mark.parametrize("weights", ["1/2", "a/b/c", "0/0/0", "-1/2/2", "1/nan/1", "inf/1/1", ""])
def test_weights_that_say_nothing_are_refused_by_name(weights: str) -> None:
    with pytest.raises(ValueError, match=f"shapes:weights is '{weights}'"):
        ShapesSource(weights=weights)


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(0.7))


def as_jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    return Image.open(file).convert("RGB")


def noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 10, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("damage", "least", "size"),
    [
        (lambda image: image, 0.995, 64),
        (lambda image: image, 0.995, 160),
        (blurred, 0.99, 64),
        (noisy, 0.99, 64),
        (as_jpeg, 0.95, 64),
    ],
)
def test_the_checker_accepts_true_pictures(
    damage: Callable[[Image.Image], Image.Image], least: float, size: int
) -> None:
    outcomes = []
    for scene, captions in scenes(150) + scenes(50, unseen=True):
        seen = read_scene(np.asarray(damage(render(scene, size))))
        outcomes += [all(holds(seen, claim) for claim in parse_caption(caption)) for caption in captions]
    assert np.mean(outcomes) >= least


def near_misses(scene: Scene) -> list[Claim]:
    """Claims that are wrong in one word."""
    thing = scene.things[0]
    colour, shape = thing.colour, thing.shape
    assert shape is not None
    wrong: list[Claim] = [Exists(other, shape) for other in COLOURS if other != colour]
    wrong += [Exists(colour, other) for other in SHAPES if other != shape]
    wrong += [Exists(colour, shape, "small" if thing.size == "large" else "large")]
    wrong += [Exists(colour, shape, None, position) for position in get_args(Position)]
    wrong += [Count(len(scene.things) + 1), Count(len(scene.things) - 1), Background("none")]
    if len(scene.things) > 1:
        pair = scene.things[1].colour, scene.things[1].shape
        wrong += [Relation((colour, shape), way, pair) for way in ("left", "right", "above", "below")]  # type: ignore[arg-type]
    return [claim for claim in wrong if not holds(scene, claim)]


def test_the_checker_rejects_captions_wrong_in_one_word() -> None:
    judged = [right for scene, _ in scenes(150) for right in check(pixels(scene), near_misses(scene)).holds]
    assert len(judged) > 3000
    assert np.mean(judged) <= 0.005


def test_the_checker_rejects_pictures_of_other_scenes() -> None:
    made = scenes(100)
    accepted = []
    for (scene, _), (_, captions) in pairwise(made):
        for claims in map(parse_caption, captions):
            if not all(holds(scene, claim) for claim in claims):
                accepted.append(check(pixels(scene), claims).all)
    assert len(accepted) > 200 and np.mean(accepted) <= 0.01


def test_a_shape_too_many_is_wrong_but_a_speck_is_not() -> None:
    scene = Scene((Thing("red", "circle", 0.3, 0.3, 0.2),), "white")
    assert check_caption(pixels(scene), "a red circle")
    speck = render(scene)
    ImageDraw.Draw(speck).rectangle((50, 50, 51, 51), fill=(0, 0, 255))
    assert check_caption(np.asarray(speck), "a red circle")
    extra = replace(scene, things=(*scene.things, Thing("blue", "star", 0.75, 0.75, 0.12)))
    assert not check_caption(pixels(extra), "a red circle")
    twice = replace(scene, things=(*scene.things, Thing("red", "circle", 0.75, 0.75, 0.12)))
    assert not check_caption(pixels(twice), "a red circle")


def test_a_blob_has_no_shape() -> None:
    picture = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(picture)
    for box in ((10, 10, 20, 50), (10, 40, 50, 50)):
        draw.rectangle(box, fill=COLOURS["red"])
    assert [thing.shape for thing in read_scene(np.asarray(picture)).things] == [None]


def test_things_of_two_colours_that_touch_stay_two() -> None:
    scene = Scene((Thing("red", "square", 0.35, 0.5, 0.13), Thing("blue", "square", 0.62, 0.5, 0.13)), "white")
    seen = {(thing.colour, thing.shape) for thing in read_scene(pixels(scene)).things}
    assert seen == {("red", "square"), ("blue", "square")}


@pytest.mark.filterwarnings("error")
def test_garbage_is_judged_wrong_without_a_word() -> None:
    rng = np.random.default_rng(0)
    for contrast in (4, 40, 90, 255):
        coarse = rng.integers(0, contrast + 1, (16, 16, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
        fine = rng.integers(0, contrast + 1, (64, 64, 3), dtype=np.uint8)
        for picture in (coarse, fine, 255 - coarse, 255 - fine):
            assert not check_caption(picture, "a red circle")


def test_components_equal_a_slow_flood_fill() -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.2, 0.4, 0.6, 1.0):
        mask = rng.random((13, 17)) < share
        parts = components(mask)
        assert (sum((part.astype(int) for part in parts), np.zeros(mask.shape, int)) == mask).all()
        assert sorted(map(set_of, parts), key=min) == sorted(flood(set_of(mask)), key=min)


def set_of(mask: np.ndarray) -> set[tuple[int, int]]:
    return set(zip(*map(list, np.nonzero(mask)), strict=True))


def flood(cells: set[tuple[int, int]]) -> list[set[tuple[int, int]]]:
    parts = []
    while cells:
        part, frontier = set(), [next(iter(cells))]
        while frontier:
            y, x = frontier.pop()
            if (y, x) in cells and (y, x) not in part:
                part.add((y, x))
                frontier += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        parts.append(part)
        cells = cells - part
    return parts


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((64, 64, 3), np.float32), "float32"),
        (np.zeros((64, 32, 3), np.uint8), r"\(64, 32, 3\)"),
        (np.zeros((16, 16, 3), np.uint8), "at least 32"),
    ],
)
def test_pictures_the_checker_can_not_read_are_refused(picture: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_scene(picture)
