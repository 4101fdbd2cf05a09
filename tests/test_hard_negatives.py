"""Changed captions read like captions, differ where they can, and depend on nothing but their random numbers."""

from __future__ import annotations

import numpy as np

from dalle_mini_impl.data.shapes import ShapesSource, parse_caption
from dalle_mini_impl.training.hard_negatives import CaptionChanger

CAPTIONS = ["a red circle", "a blue circle", "a red square", "a blue square above a red circle", "a green star"]


def _many(caption: str, number: int = 60, captions: list[str] = CAPTIONS) -> set[str]:
    changer = CaptionChanger(captions)
    return {changer.changed(caption, np.random.default_rng(seed)) for seed in range(number)}


def test_words_change_only_for_words_seen_between_the_same_neighbours() -> None:
    assert _many("a red circle") == {"a blue circle", "a red square"}
    assert _many("a red square") == {"a blue square", "a red circle"}
    assert _many("a green star") == {"a green star"}, "nothing is known to fit: it stays"


def test_words_are_swapped_where_each_has_stood_in_the_others_place() -> None:
    captions = ["a red circle above a blue square", "a blue circle above a red square"]
    assert "a blue circle above a red square" in _many(captions[0], captions=captions)


def test_the_same_random_numbers_change_a_caption_alike() -> None:
    captions = [caption for index in range(300) for caption in ShapesSource(300).scene(index)[1]]
    one, other = CaptionChanger(captions), CaptionChanger(reversed(captions))
    for index, caption in enumerate(captions[:100]):
        rngs = [np.random.default_rng(index) for _ in range(2)]
        assert one.changed(caption, rngs[0]) == other.changed(caption, rngs[1])


def test_nearly_all_captions_of_made_scenes_change_and_most_still_read_like_captions() -> None:
    captions = [caption for index in range(400) for caption in ShapesSource(400).scene(index)[1]]
    changer, rng = CaptionChanger(captions), np.random.default_rng(0)
    changed = readable = 0
    for caption in captions:
        other = changer.changed(caption, rng)
        changed += other != caption
        try:
            parse_caption(other)
            readable += 1
        except ValueError:
            pass
    assert changed > 0.95 * len(captions)
    assert readable > 0.7 * len(captions)
