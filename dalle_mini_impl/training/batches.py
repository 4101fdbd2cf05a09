"""The order of the data and the randomness of every sample, as pure functions of the step.

Nothing here has a state to save: batch k is the same whether the run got there in one go or was resumed, whatever
the number of processes and however the batch is cut into micro-batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Batch = dict[str, Tensor]
"""Tensors that share their first dimension, a row a sample."""
Indices = npt.NDArray[np.int64]


def derive_seed(*keys: int | str) -> int:
    """A 63-bit seed that depends on every key and on their order, the same on every machine."""
    digest = hashlib.sha256("\x1f".join(str(key) for key in keys).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample_rng(seed: int, stage: str, position: int) -> np.random.Generator:
    """The random numbers of the sample at one place of a stage's endless sequence of samples."""
    return np.random.default_rng([seed, int.from_bytes(stage.encode(), "big"), position])


def share_of_batch(batch_size: int, world_size: int, name: str = "batch_size") -> int:
    """Samples of a global batch that each process takes; ValueError where it can't be shared out evenly."""
    if batch_size % world_size:
        nearest = max(1, round(batch_size / world_size)) * world_size
        raise ValueError(f"{name} {batch_size} can't be shared evenly by {world_size} processes; use {nearest}")
    return batch_size // world_size


@dataclass(frozen=True)
class BatchOrder:
    """An endless sequence of items, a new permutation every epoch, cut into batches of one size.

    num_items: items 0 … num_items - 1 are visited once an epoch; batches run on across the end of an epoch.
    batch_size: of the global batch, over all processes.
    """

    num_items: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_items < 1 or self.batch_size < 1:
            raise ValueError(f"batches of {self.batch_size} out of {self.num_items} items: both must be at least 1")

    def positions(self, step: int, rank: int = 0, world_size: int = 1) -> Indices:
        """Places in the sequence of the samples that one process takes in a step, (batch_size / world_size,).

        Raises ValueError where the batch can't be shared out evenly.
        """
        share = share_of_batch(self.batch_size, world_size)
        start = step * self.batch_size + rank * share
        return np.arange(start, start + share, dtype=np.int64)

    def items(self, positions: Indices) -> Indices:
        """The items that stand at the given places, same shape."""
        epochs = positions // self.num_items
        items = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            items[chosen] = self._permutation(int(epoch))[positions[chosen] % self.num_items]
        return items

    def _permutation(self, epoch: int) -> Indices:
        cached: dict[int, Indices] = self.__dict__.setdefault("_cache", {})
        if epoch not in cached:
            if len(cached) > 1:
                cached.pop(min(cached))
            cached[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.num_items)
        return cached[epoch]


class LengthBatches:
    """The batches of an order, arranged so that samples of like length share one.

    The samples of `block` batches are sorted by length and cut into batches again, which come in a random order: all
    of them are still seen once an epoch, and which batch a step takes depends on nothing but the step.
    lengths: of the samples at some items and positions, a pure function.
    """

    def __init__(self, order: BatchOrder, lengths: Callable[[Indices, Indices], Indices], block: int = 16) -> None:
        self.order, self.lengths, self.block = order, lengths, block
        self._arranged: tuple[int, Indices] | None = None

    def positions(self, step: int, rank: int = 0, world_size: int = 1) -> Indices:
        """As `BatchOrder.positions`; every process gets every world_size-th sample, so that all have as much to do."""
        self.order.positions(step, rank, world_size)  # refuses an uneven split
        number = step // self.block
        if self._arranged is None or self._arranged[0] != number:
            self._arranged = number, self._arrange(number)
        return self._arranged[1][step % self.block, rank::world_size]

    def _arrange(self, number: int) -> Indices:
        first = number * self.block
        positions = np.concatenate([self.order.positions(step) for step in range(first, first + self.block)])
        lengths = self.lengths(self.order.items(positions), positions)
        batches = positions[np.argsort(lengths, kind="stable")].reshape(self.block, -1)
        return batches[np.random.default_rng([self.order.seed, number]).permutation(self.block)]


def split_batch(batch: Batch, micro_batch_size: int | None) -> Iterator[Batch]:
    """Cuts a batch into micro-batches of at most micro_batch_size rows, in order; None leaves it whole."""
    num_rows = next(iter(batch.values())).shape[0]
    size = micro_batch_size or num_rows
    for start in range(0, num_rows, size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}


class Prefetcher:
    """Makes the next batch in a background thread while the current one is trained on.

    make: the batch of a step, a pure function; it may only use what no other thread writes to.
    """

    def __init__(self, make: Callable[[int], Batch], pin_memory: bool = False) -> None:
        self._make = make
        self._pin = pin_memory
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._keep_to_one_core()
        self._next: tuple[int, Future[Batch]] | None = None

    def get(self, step: int) -> Batch:
        """The batch of `step`; that of step + 1 starts being made."""
        if self._next is None or self._next[0] != step:
            self._next = (step, self._pool.submit(self._build, step))
        batch = self._next[1].result()
        self._next = (step + 1, self._pool.submit(self._build, step + 1))
        return batch

    def close(self) -> None:
        """Ends the thread; a batch being made is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _keep_to_one_core(self) -> None:
        """Lets the thread compute with itself alone.

        One tensor operation that is large enough gives a thread a team of OpenMP workers of its own. With more of
        them than cores, all teams go to sleep between operations instead of waiting: a training step on two cores
        then takes 1.25 times as long.
        """

        def be_alone() -> int:
            torch.set_num_threads(1)
            return torch.get_num_threads()  # from the first call on, a thread keeps its number

        num_threads = torch.get_num_threads()
        self._pool.submit(be_alone).result()
        torch.set_num_threads(num_threads)  # of threads to come; this one's own never changed

    def _build(self, step: int) -> Batch:
        batch = self._make(step)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pin else batch


def rows_where(chosen: Tensor, device: torch.device) -> Tensor:
    """The numbers of the rows (n,) that are chosen, on a device; chosen: (B,) bool on the host, so nothing waits."""
    return chosen.nonzero()[:, 0].to(device, non_blocking=True)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Moves a batch, without waiting for the copy where the memory is pinned."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
