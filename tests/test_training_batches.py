"""The order of the data: whole epochs, no state, the same however it is shared out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dalle_mini_impl.training.batches import (
    BatchOrder,
    Indices,
    LengthBatches,
    Prefetcher,
    derive_seed,
    sample_rng,
    split_batch,
)


def test_every_epoch_visits_every_item_once() -> None:
    order = BatchOrder(num_items=10, batch_size=4, seed=3)
    items = np.concatenate([order.items(order.positions(step)) for step in range(10)])  # 40 samples, 4 epochs
    epochs = items.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_a_batch_does_not_depend_on_the_batches_before_it() -> None:
    one, other = BatchOrder(7, 3, seed=1), BatchOrder(7, 3, seed=1)
    walked = [one.items(one.positions(step)).tolist() for step in range(20)]
    assert other.items(other.positions(19)).tolist() == walked[19]
    assert other.items(other.positions(2)).tolist() == walked[2]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_the_global_batch(world_size: int) -> None:
    order = BatchOrder(100, 8, seed=0)
    parts = [order.positions(5, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(parts).tolist() == order.positions(5).tolist()


def test_an_uneven_share_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"batch_size 64 .* 3 processes; use 63"):
        BatchOrder(100, 64, seed=0).positions(0, 0, 3)


def test_random_numbers_belong_to_the_sample() -> None:
    assert sample_rng(0, "dalle", 5).random() == sample_rng(0, "dalle", 5).random()
    numbers = {
        sample_rng(seed, stage, place).random() for seed in (0, 1) for stage in ("vae", "clip") for place in (0, 1)
    }
    assert len(numbers) == 8
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_micro_batches_add_up_to_the_batch() -> None:
    batch = {"a": torch.arange(7), "b": torch.arange(14).view(7, 2)}
    parts = list(split_batch(batch, 3))
    assert [len(part["a"]) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part["b"] for part in parts]), batch["b"])
    assert len(list(split_batch(batch, None))) == 1


def test_prefetching_changes_no_batch_and_raises_what_went_wrong() -> None:
    def make(step: int) -> dict[str, torch.Tensor]:
        if step == 4:
            raise ValueError("broken")
        return {"step": torch.tensor([step])}

    prefetcher = Prefetcher(make)
    assert [int(prefetcher.get(step)["step"]) for step in (0, 1, 2, 9, 3)] == [0, 1, 2, 9, 3]
    with pytest.raises(ValueError, match="broken"):
        prefetcher.get(4)
    prefetcher.close()


def _lengths(items: Indices, positions: Indices) -> Indices:
    return (items * 7 + positions) % 5


def test_sorted_batches_hold_the_same_samples_and_like_lengths() -> None:
    order = BatchOrder(num_items=37, batch_size=8, seed=3)
    batches = LengthBatches(order, _lengths, block=4)
    for block in range(3):
        steps = range(4 * block, 4 * block + 4)
        plain = np.concatenate([order.positions(step) for step in steps])
        arranged = [batches.positions(step) for step in steps]
        assert sorted(np.concatenate(arranged).tolist()) == plain.tolist()
        widths = [np.ptp(_lengths(order.items(part), part)) for part in arranged]
        assert max(widths) < 4 and sum(widths) < 4 * 2
    means = [float(_lengths(order.items(p), p).mean()) for p in (batches.positions(step) for step in range(4))]
    assert means != sorted(means), "short ones don't come first"


def test_sorted_batches_depend_on_the_step_alone() -> None:
    order = BatchOrder(num_items=37, batch_size=8, seed=3)
    forwards, later = (LengthBatches(order, _lengths, block=4) for _ in range(2))
    expected = [forwards.positions(step) for step in range(12)]
    for step in (11, 2, 7):
        assert (later.positions(step) == expected[step]).all()
        shares = [later.positions(step, rank, 2) for rank in range(2)]
        assert sorted(np.concatenate(shares).tolist()) == sorted(expected[step].tolist())
    with pytest.raises(ValueError, match="can't be shared evenly by 3"):
        later.positions(0, 0, 3)
