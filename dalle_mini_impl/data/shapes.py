"""The made source `shapes`: endless true captions, and prompts whose pictures `checker.py` can judge.

Colour-shape pairs of `HELD_OUT_PAIRS` are never drawn for training or validation; prompts for evaluation come from
scenes of their own, with such pairs ("unseen") or without ("seen").
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import partial
from typing import Literal

from dalle_mini_impl.data.records import Record
from dalle_mini_impl.data.scenes import HELD_OUT_PAIRS, NUMBER_WEIGHTS, Scene, render, sample_scene
from dalle_mini_impl.data.shape_captions import describe, parse_caption

__all__ = ["HELD_OUT_PAIRS", "ShapesSource", "held_out_prompts", "held_out_scenes", "parse_caption", "render"]

VALIDATION_EVERY = 20


class ShapesSource:
    """Pictures of coloured shapes with 2 to 4 captions each; every 20th is for validation.

    count: number of pictures; picture i depends on (seed, i) alone, so a larger count keeps the first ones.
    image_size: side in pixels, at least 16. weights: how often scenes have one, two and three shapes, as "1/3/6";
    prompts for evaluation (`held_out_scenes`) always have them as 3/4/3.
    """

    kind = "shapes"

    def __init__(self, count: int = 20_000, seed: int = 0, image_size: int = 64, weights: str = "3/4/3") -> None:
        if count < 1:
            raise ValueError(f"shapes:count is {count}; it must be at least 1")
        if image_size < 16:
            raise ValueError(f"shapes need pictures of at least 16 pixels to be told apart, not {image_size}")
        self.count, self.seed, self.image_size = count, seed, image_size
        self.weights = _parse_weights(weights)

    @property
    def describe(self) -> str:
        """What the source is, in a line; equal lines mean equal pictures and captions."""
        weights = "/".join(f"{weight:g}" for weight in self.weights)
        own = "" if self.weights == NUMBER_WEIGHTS else f",weights={weights}"
        return f"shapes:count={self.count},seed={self.seed}{own} at {self.image_size} pixels"

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Record]:
        for index in range(self.count):
            scene, captions = self.scene(index)
            yield Record(
                name=f"shapes/{index:06d}",
                load=partial(render, scene, self.image_size),
                captions=captions,
                split="validation" if index % VALIDATION_EVERY == VALIDATION_EVERY - 1 else "train",
            )

    def scene(self, index: int) -> tuple[Scene, tuple[str, ...]]:
        """The ground truth of picture `index` and its captions."""
        rng = random.Random(f"shapes/{self.seed}/{index}")
        scene = sample_scene(rng, weights=self.weights)
        return scene, tuple(describe(scene, rng, number=rng.randint(2, 4)))


def _parse_weights(text: str) -> tuple[float, float, float]:
    """Three weights written "3/4/3"; ValueError for anything else, negative ones and nothing but zeros."""
    try:
        one, two, three = (float(part) for part in text.split("/"))
    except ValueError:
        one = two = three = -1.0
    if not (min(one, two, three) >= 0 and 0 < one + two + three < math.inf):
        raise ValueError(
            f"shapes:weights is {text!r}; it must be three numbers from 0 on, how often scenes have one, two and three "
            "shapes, as 1/3/6"
        )
    return one, two, three


def held_out_scenes(n: int, seed: int = 0, pairs: Literal["seen", "unseen"] = "seen") -> list[tuple[Scene, str]]:
    """Draws n scenes for evaluation, each with one caption; none is a scene of any `ShapesSource`.

    pairs: "seen" uses only colour-shape pairs that training shows; with "unseen" each scene has one that it doesn't.
    """
    if pairs not in ("seen", "unseen"):
        raise ValueError(f'pairs is {pairs!r}; it must be "seen" or "unseen"')
    chosen = []
    for index in range(n):
        rng = random.Random(f"shapes/held out/{pairs}/{seed}/{index}")
        scene = sample_scene(rng, unseen=pairs == "unseen")
        chosen.append((scene, rng.choice(describe(scene, rng, number=4))))
    return chosen


def held_out_prompts(n: int, seed: int = 0, pairs: Literal["seen", "unseen"] = "seen") -> list[str]:
    """The captions of `held_out_scenes`."""
    return [caption for _, caption in held_out_scenes(n, seed, pairs)]
