"""What is drawn: pictures with their scores, and their ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image
from torch import Tensor

DEFAULT_KEEP = 4


@dataclass(frozen=True, kw_only=True)
class RankedPicture:
    """A drawn picture and how it did.

    rank: 1 is the best of its prompt, 0 means not ranked. candidate: its number, which with prompt, seed and settings
    fixes its tokens. clip_score: cosine similarity with the prompt, or with the embedding where there is no prompt;
    None without a CLIP. log_ratio: Σ log p(x|prompt) - log p(x|null). log_likelihood: its first part. read_score:
    log p(prompt|picture) in nats, None where neither a captioner nor DALL·E reads. score: what it is ranked by, see
    `TextToImage.ranked_by`. tokens: image ids (N,) int64. embedding: the picture embedding (E,) that it was drawn by.
    """

    image: Image.Image
    prompt: str
    rank: int
    candidate: int
    seed: int
    clip_score: float | None
    log_ratio: float
    log_likelihood: float
    read_score: float | None
    score: float
    tokens: Tensor
    embedding: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """How well a caption fits a picture; the fields are those of `RankedPicture`."""

    caption: str
    score: float
    clip_score: float | None
    read_score: float | None
    log_likelihood: float


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The pictures of a prompt while they are drawn.

    images: every candidate, grey where nothing is drawn yet. done, total: image tokens. ranked: None until all are
    drawn, then the best of them, best first.
    """

    images: list[Image.Image]
    done: int
    total: int
    ranked: list[RankedPicture] | None = None


def check_counts(candidates: int, keep: int | None) -> int:
    """The number of pictures to keep; ValueError unless 1 ≤ keep ≤ candidates."""
    if candidates < 1:
        raise ValueError(f"candidates is {candidates}; draw at least 1")
    if keep is None:
        return min(DEFAULT_KEEP, candidates)
    if not 1 <= keep <= candidates:
        raise ValueError(f"keep is {keep}, but of {candidates} candidates 1 to {candidates} can be kept")
    return keep


def rank_sequence(rows: Sequence[Sequence[RankedPicture]], keep: int) -> list[list[RankedPicture]]:
    """The pictures of each row by the sum of their candidate number's scores over all rows, the best `keep` first."""
    totals = [sum(picture.score for picture in column) for column in zip(*rows, strict=True)]
    order = sorted(range(len(totals)), key=lambda candidate: (-totals[candidate], candidate))[:keep]
    return [[replace(row[candidate], rank=place) for place, candidate in enumerate(order, start=1)] for row in rows]


def rank(pictures: Sequence[RankedPicture], keep: int) -> list[RankedPicture]:
    """The best `keep` of one prompt's pictures by `score`, best first.

    Equal scores go by candidate number, so the ranking doesn't depend on the order of the pictures.
    """
    ordered = sorted(pictures, key=lambda picture: (-picture.score, picture.candidate))[:keep]
    return [replace(picture, rank=place) for place, picture in enumerate(ordered, start=1)]
