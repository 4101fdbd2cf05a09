"""Best-of-N: ranking pictures against a prompt with CLIP, and what N is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_mini_impl.embed import Embedder, Pictures

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

CURVE_SIZES = (1, 2, 4, 8, 16, 32, 64)


def score_pairs(
    embedder: Embedder, pictures: Tensor | Sequence[Image.Image], prompts: Sequence[str], batch_size: int = 64
) -> Tensor:
    """Cosine similarity (n,) float32 in [-1, 1] of picture i and prompts[i].

    pictures: (n, 3, S, S) in [0, 1], or PIL images, which the embedder preprocesses as in its training.
    """
    if len(pictures) != len(prompts):
        raise ValueError(f"{len(pictures)} pictures came with {len(prompts)} prompts: give as many")
    if not prompts:
        return torch.zeros(0)
    unique = list(dict.fromkeys(prompts))
    text_vectors = embedder.encode_texts(unique, batch_size)
    owner = torch.tensor([unique.index(prompt) for prompt in prompts], dtype=torch.long)
    return (embedder.encode_pictures(pictures, batch_size) * text_vectors[owner]).sum(dim=1)


def rank_pictures(embedder: Embedder, pictures: Pictures, prompt: str, batch_size: int = 64) -> Tensor:
    """CLIP scores (n,) of pictures against one prompt: sort descending for the ranking. pictures: see `embed`."""
    return (embedder.encode_pictures(pictures, batch_size) * embedder.encode_texts([prompt])).sum(dim=1)


def best_of_n(scores: FloatArray, quality: FloatArray, size: int) -> float:
    """Expected quality of the best-scored of `size` candidates drawn from a pool of M without replacement.

    scores, quality: (M,). Exact over all subsets, so it is the unbiased estimate of best-of-N from M ≥ N samples;
    of equal scores each is the best equally often. ValueError unless 1 ≤ size ≤ M.
    """
    pool = len(scores)
    if not 1 <= size <= pool:
        raise ValueError(f"best of {size} can't be told from {pool} candidates: draw at least {size}")
    order = np.argsort(-scores, kind="stable")
    _, group = np.unique(-scores[order], return_inverse=True)
    shared = np.bincount(group, weights=quality[order]) / np.bincount(group)  # mean quality among equal scores
    # Rank r (from 0) is the best of a subset when the other size - 1 all rank below it.
    weight, remaining = size / pool, 0.0
    expected = 0.0
    for rank in range(pool - size + 1):
        expected += weight * float(shared[group[rank]])
        remaining = pool - 1 - rank
        weight *= (remaining - size + 1) / remaining if remaining else 0.0
    return expected


@dataclass(frozen=True)
class CurvePoint:
    """Mean quality of best-of-`size` over the prompts, with a bootstrap confidence interval."""

    size: int
    mean: float
    low: float
    high: float


def best_of_n_curve(
    scores: FloatArray,
    quality: FloatArray,
    sizes: Sequence[int] = CURVE_SIZES,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[CurvePoint]:
    """Quality against N for P prompts with M candidates each; scores and quality are (P, M).

    quality comes from a judge that is not the ranker. Sizes beyond M are left out. The interval is the percentile
    bootstrap over prompts, which are what varies: candidates of one prompt succeed or fail together.
    """
    if scores.shape != quality.shape or scores.ndim != 2 or not scores.size:
        raise ValueError(f"scores {scores.shape} and quality {quality.shape} must both be (prompts, candidates)")
    num_prompts, pool = scores.shape
    rng = np.random.default_rng(seed)
    draws = rng.integers(num_prompts, size=(resamples, num_prompts))
    tail = 50 * (1 - confidence)
    points = []
    for size in sizes:
        if size > pool:
            continue
        values = np.array([best_of_n(scores[row], quality[row], size) for row in range(num_prompts)])
        low, high = np.percentile(values[draws].mean(axis=1), [tail, 100 - tail])
        points.append(CurvePoint(size=size, mean=float(values.mean()), low=float(low), high=float(high)))
    return points
