"""The id cache holds what the VAE says, and nothing stale."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from dalle_mini_impl.config import View
from dalle_mini_impl.data.array_cache import Workers
from dalle_mini_impl.data.token_cache import (
    TokenCache,
    cache_fingerprint,
    images_from_pixels,
    unigram_nll,
)
from dalle_mini_impl.data.views import apply_view
from dalle_mini_impl.vae.model import DiscreteVAE
from tests.tiny import tiny_bundle

NO_PID = 2**22 + 1
"""Linux gives no process a larger one than 2**22."""


@pytest.fixture(scope="module")
def vae() -> DiscreteVAE:
    model = tiny_bundle().vae
    assert model is not None
    return model


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)


def test_ids_are_the_vaes_own_in_each_view(vae: DiscreteVAE, pictures: np.ndarray, tmp_path: Path) -> None:
    cache = TokenCache.build(tmp_path, vae, pictures, ["plain", "flip"], "f", batch_size=4)
    images = images_from_pixels(torch.from_numpy(pictures))
    assert torch.equal(cache.ids(np.arange(10)), vae.encode(images))
    assert torch.equal(cache.ids(np.arange(10), np.ones(10, dtype=np.int64)), vae.encode(images.flip(-1)))
    mixed = cache.ids(np.array([3, 3]), np.array([0, 1]))
    assert torch.equal(mixed, torch.cat([vae.encode(images[3:4]), vae.encode(images[3:4].flip(-1))]))
    assert cache.counts(np.arange(10)).sum() == 10 * 16


MOVES: dict[View, tuple[int, int]] = {
    "up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1),
    "up_left": (-1, -1), "up_right": (-1, 1), "down_left": (1, -1), "down_right": (1, 1),
}  # fmt: skip


@pytest.mark.parametrize(("side", "pixels"), [(16, 1), (64, 3), (80, 4), (256, 12)])
@pytest.mark.parametrize("view", MOVES)
def test_a_moved_view_repeats_its_borders(view: View, side: int, pixels: int) -> None:
    images = torch.rand(2, 3, side, side)
    down, right = MOVES[view]
    moved = apply_view(images, view)
    assert moved.shape == images.shape
    for row, column in ((0, 0), (side // 2, 1), (side - 1, side // 3), (side - 1, side - 1)):
        source = [min(max(place - pixels * way, 0), side - 1) for place, way in ((row, down), (column, right))]
        assert torch.equal(moved[:, :, row, column], images[:, :, source[0], source[1]])


def test_views_of_larger_pictures_show_what_those_of_small_ones_do() -> None:
    def enlarged(images: torch.Tensor) -> torch.Tensor:
        return images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    for side in (16, 80, 96):
        images = torch.rand(1, 3, side, side)
        for view in get_args(View):
            assert torch.equal(apply_view(enlarged(images), view, 2), enlarged(apply_view(images, view))), (side, view)


def test_processes_fill_in_one_file(vae: DiscreteVAE, pictures: np.ndarray, tmp_path: Path) -> None:
    whole = TokenCache.build(tmp_path / "one", vae, pictures, ["plain"], "f")
    second_done = []

    def barrier() -> None:  # while the first process waits for the others, the second one does its part
        if len(second_done) == 1:
            parts = np.lib.format.open_memmap(tmp_path / "two" / f".tokens.npy.{NO_PID}.partial", mode="r+")
            parts[:, 5:] = whole.tokens[:, 5:]
            parts.flush()
        second_done.append(True)

    workers = Workers(0, 2, barrier, NO_PID)
    shared = TokenCache.build(tmp_path / "two", vae, pictures, ["plain"], "f", workers=workers)
    assert np.array_equal(shared.tokens, whole.tokens)


def test_a_half_written_cache_is_left_to_a_living_process_and_removed_for_a_dead_one(
    vae: DiscreteVAE, pictures: np.ndarray, tmp_path: Path
) -> None:
    living, dead = (tmp_path / f".tokens.npy.{pid}.partial" for pid in (os.getppid(), NO_PID))
    for path in (living, dead):
        path.write_bytes(b"half a file")
    TokenCache.build(tmp_path, vae, pictures, ["plain"], "f")
    assert [path.name for path in sorted(tmp_path.iterdir())] == [living.name, "tokens.json", "tokens.npy"]
    assert living.read_bytes() == b"half a file"


def test_a_cache_is_replaced_where_it_is_mapped_or_a_link(
    vae: DiscreteVAE, pictures: np.ndarray, tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    mapped = TokenCache.build(theirs, vae, pictures, ["plain"], "f")
    before = mapped.tokens.copy()
    ours.mkdir()
    for path in theirs.iterdir():
        (ours / path.name).symlink_to(path)
    assert TokenCache.open(ours, "f") is not None
    TokenCache.build(ours, vae, 255 - pictures[:5], ["plain"], "g")
    assert TokenCache.open(ours, "g") is not None and TokenCache.open(theirs, "f") is not None
    assert np.array_equal(mapped.tokens, before) and np.array_equal(np.load(theirs / "tokens.npy"), before)


def test_a_stale_or_broken_cache_is_not_opened(vae: DiscreteVAE, pictures: np.ndarray, tmp_path: Path) -> None:
    fingerprint = cache_fingerprint(vae, "data", ["plain"])
    assert TokenCache.open(tmp_path, fingerprint) is None
    TokenCache.build(tmp_path, vae, pictures, ["plain"], fingerprint)
    assert TokenCache.open(tmp_path, fingerprint) is not None
    assert TokenCache.open(tmp_path, cache_fingerprint(vae, "other data", ["plain"])) is None
    assert TokenCache.open(tmp_path, cache_fingerprint(vae, "data", ["plain", "flip"])) is None
    (tmp_path / "tokens.npy").write_bytes(b"half a file")
    assert TokenCache.open(tmp_path, fingerprint) is None


def test_other_weights_change_the_fingerprint() -> None:
    one, same, other = (tiny_bundle(seed=seed).vae for seed in (0, 0, 1))
    assert one is not None and same is not None and other is not None
    assert cache_fingerprint(one, "d", ["plain"]) == cache_fingerprint(same, "d", ["plain"])
    assert cache_fingerprint(one, "d", ["plain"]) != cache_fingerprint(other, "d", ["plain"])


def test_the_unigram_floor_is_the_entropy_of_frequent_codes() -> None:
    counts = np.array([10_000, 10_000, 0, 0])
    assert unigram_nll(counts, counts) == pytest.approx(math.log(2), abs=1e-3)
    assert unigram_nll(np.zeros(4, dtype=np.int64), counts) == pytest.approx(math.log(4))
