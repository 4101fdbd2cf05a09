"""Pictures drawn for captions of the data, and what ranking them is worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.drawing import LIKELIHOOD_WEIGHT
from dalle_mini_impl.drawn import RankedPicture
from dalle_mini_impl.pipeline import TextToImage
from dalle_mini_impl.rerank import CurvePoint, FloatArray, best_of_n_curve
from dalle_mini_impl.text import normalize_caption

_PICTURES_AT_ONCE = 256

RANKERS = {
    "clip": "best by CLIP",
    "log_ratio": "best by log-likelihood ratio",
    "reading": "best by reading the caption",
    "likelihood": "best by likelihood",
    "clip_reading": "best by CLIP and reading",
    "rank": "best by rank, all together",
    "oracle": "best by the judge itself",
}
"""Curves of `ranker_curves`, in words."""


@dataclass(frozen=True)
class Prompt:
    """The first caption of picture `index` of the data; from_training: whether that is a training picture."""

    text: str
    index: int
    from_training: bool


def choose_prompts(data: PreparedData, number: int, seed: int = 0) -> list[Prompt]:
    """At most `number` captions: training and held-out ones in turn, as many of each, a side's own all different.

    Where nothing is held out with a caption, all are of training pictures; where no training picture has one, there are
    none. Both sides may have the same caption, as all do where captions are a few names of classes: the memorisation
    audit tells pictures seen in training from unseen ones, not captions, and asks that either side has as many pictures
    whose captions are drawn for. A picture of the caption on each side keeps that even, while sharing the captions out
    would halve them and leave nothing to compare where there is but one.
    """
    rng = np.random.default_rng(seed)

    def some(
        indices: np.ndarray[tuple[int, ...], np.dtype[np.int64]], wanted: int, from_training: bool
    ) -> list[Prompt]:
        found: list[Prompt] = []
        seen: set[str] = set()
        for index in rng.permutation(indices):
            if len(found) == wanted:
                break
            captions = data.captions[index]
            if captions and (key := normalize_caption(captions[0])) not in seen:
                seen.add(key)
                found.append(Prompt(captions[0], int(index), from_training))
        return found

    held_out = some(data.validation, number // 2, False)
    training = some(data.train, len(held_out) or number, True)
    if not held_out:
        return training
    return [prompt for pair in zip(training, held_out, strict=False) for prompt in pair]


def draw_candidates(
    model: TextToImage,
    prompts: Sequence[str],
    candidates: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[str, list[RankedPicture]]]:
    """Each prompt with its candidates in the order of their numbers, many prompts to a batch.

    Where a prompt comes again, its numbers go on, since the same ones would be the same pictures once more.
    progress: called with the image tokens drawn so far.
    """
    num_tokens = model.dalle.stream.num_image_tokens
    at_once = max(1, _PICTURES_AT_ONCE // candidates)
    num_drawn: Counter[str] = Counter()
    for first in range(0, len(prompts), at_once):
        part = prompts[first : first + at_once]
        jobs = []
        for index, prompt in enumerate(part):
            key = normalize_caption(prompt)
            jobs += [(index, num_drawn[key] + candidate) for candidate in range(candidates)]
            num_drawn[key] += candidates
        before = first * candidates * num_tokens

        def advance(done: int, _: int, before: int = before) -> None:
            progress(before + done)

        pictures = model.draw_jobs(part, jobs, seed, progress=advance)
        for index, prompt in enumerate(part):
            yield prompt, pictures[index * candidates : (index + 1) * candidates]


def scores_of(pictures: Sequence[RankedPicture]) -> dict[str, list[float | None]]:
    """What each ranker says of one prompt's pictures, by the keys of RANKERS."""
    return {
        "clip": [picture.clip_score for picture in pictures],
        "log_ratio": [picture.log_ratio for picture in pictures],
        "reading": [picture.read_score for picture in pictures],
        "likelihood": [picture.log_likelihood for picture in pictures],
        "clip_reading": [_clip_and_reading(picture) for picture in pictures],
        "rank": [picture.score for picture in pictures],
    }


def _clip_and_reading(picture: RankedPicture) -> float | None:
    """The score but for the picture's own likelihood; None where one of both is missing."""
    if picture.clip_score is None or picture.read_score is None:
        return None
    return picture.score - LIKELIHOOD_WEIGHT * picture.log_likelihood


def ranker_curves(
    scores: Sequence[Mapping[str, Sequence[float | None]]],
    quality: Sequence[Sequence[float]],
    rankers: Sequence[str],
    seed: int = 0,
) -> dict[str, list[CurvePoint]]:
    """Best-of-N curves of rankers (keys of RANKERS), of those that have scored all pictures.

    scores: `scores_of` each prompt's pictures; quality: what the judge says of them, who is the ranker "oracle", too.
    """
    judged: FloatArray = np.array(quality, dtype=np.float64)
    curves = {}
    for name in rankers:
        rows = quality if name == "oracle" else [of_prompt[name] for of_prompt in scores]
        if not any(value is None for row in rows for value in row):
            curves[name] = best_of_n_curve(np.array(rows, dtype=np.float64), judged, seed=seed)
    return curves
