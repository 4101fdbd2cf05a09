"""Faults of reranking that are forbidden here: biased best-of-N, scores that depend on the batch."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from dalle_mini_impl.rerank import best_of_n, best_of_n_curve, rank_pictures, score_pairs
from tests.tiny import TINY_CAPTIONS, tiny_bundle


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_best_of_n_is_the_mean_over_all_subsets(size: int) -> None:
    rng = np.random.default_rng(0)
    scores, quality = rng.permutation(7).astype(float), rng.random(7)
    subsets = [list(subset) for subset in combinations(range(7), size)]
    expected = np.mean([quality[subset][np.argmax(scores[subset])] for subset in subsets])
    assert best_of_n(scores, quality, size) == pytest.approx(expected)


def test_of_equal_scores_none_is_favoured() -> None:
    quality = np.array([1.0, 0.0, 0.0, 0.0])
    for size in (1, 2, 4):
        assert best_of_n(np.zeros(4), quality, size) == pytest.approx(0.25)
    two_best = np.array([1.0, 1.0, 0.0, 0.0])
    assert best_of_n(two_best, quality, 4) == pytest.approx(0.5)


def test_more_than_the_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="best of 5 can't be told from 4"):
        best_of_n(np.zeros(4), np.zeros(4), 5)


def test_the_curve_rises_for_a_good_ranker_and_not_for_a_blind_one() -> None:
    rng = np.random.default_rng(1)
    quality = (rng.random((40, 16)) < 0.3).astype(float)
    good = best_of_n_curve(quality + rng.normal(0, 0.1, quality.shape), quality)
    assert [point.size for point in good] == [1, 2, 4, 8, 16]
    assert good[0].mean == pytest.approx(quality.mean())
    assert all(a.mean < b.mean for a, b in pairwise(good))
    assert all(point.low <= point.mean <= point.high for point in good)
    blind = best_of_n_curve(rng.random(quality.shape), quality)
    assert blind[-1].low < quality.mean() < blind[-1].high
    assert best_of_n_curve(quality, quality) == best_of_n_curve(quality, quality), "the bootstrap is not seeded"


def test_a_curve_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="must both be"):
        best_of_n_curve(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="must both be"):
        best_of_n_curve(np.zeros((0, 3)), np.zeros((0, 3)))


def test_scores_depend_on_the_pair_alone() -> None:
    bundle = tiny_bundle()
    assert bundle.embedder is not None
    pictures = torch.rand(6, 3, 16, 16)
    prompts = [TINY_CAPTIONS[index % 3] for index in range(6)]
    scores = score_pairs(bundle.embedder, pictures, prompts)
    assert scores.shape == (6,) and (scores.abs() <= 1 + 1e-5).all()
    assert torch.allclose(score_pairs(bundle.embedder, pictures, prompts, batch_size=4), scores, atol=1e-5)
    for caption in range(3):
        alone = rank_pictures(bundle.embedder, pictures[caption::3], TINY_CAPTIONS[caption])
        assert torch.allclose(alone, scores[caption::3], atol=1e-5)
    assert score_pairs(bundle.embedder, pictures[:0], []).shape == (0,)
    with pytest.raises(ValueError, match="6 pictures came with 1 prompts"):
        score_pairs(bundle.embedder, pictures, ["x"])
