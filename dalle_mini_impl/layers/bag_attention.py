"""Attention of few queries over a long cache, at the speed of the CPU's memory.

One query's attention is two weighted sums of rows: values weighted by probabilities, and, where keys lie with a
dimension a row, rows of scores weighted by the query's numbers. `F.embedding_bag` is a weighted sum of rows, and its
CPU kernel runs at memory speed where batched matrix products of one row reach a fifth to a half of it (and the fused
attention kernel a twentieth): docs/decisions.md has the figures. Each sum is computed by itself, so its bits don't
depend on what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from dalle_mini_impl.layers.attention import KVCache, attend

CHUNK = 96
"""Positions a row of keys holds; the last row of a sequence is read whole, however few of them are filled."""
MAX_QUERIES = 16
"""With more tokens at once than this, attention is done by matrix products."""


@dataclass(frozen=True)
class _Places:
    """Rows of the two tables that `count` tokens of each of `batch` sequences read when `end` tokens are filled."""

    batch: int
    count: int
    end: int
    key_rows: Tensor
    key_bags: Tensor
    value_rows: Tensor
    value_bags: Tensor
    unseen: Tensor | None
    """(count, 1, positions): later than a token's own; None where only the unfilled ones are."""


@dataclass
class BagCache(KVCache):
    """A KVCache whose keys lie in chunks of positions: (layers, B, H, chunks, D, CHUNK)."""

    _places: list[_Places] = field(default_factory=list, repr=False)
    """The latest, for the other layers of a pass."""

    _room = staticmethod(torch.empty)  # memory is only touched where it is filled

    @staticmethod
    def _keys_shape(layers: int, batch: int, heads: int, capacity: int, head_dim: int) -> tuple[int, ...]:
        return layers, batch, heads, -(-capacity // CHUNK), head_dim, CHUNK

    def mix(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `KVCache.mix`."""
        count = q.shape[1]
        end = self.check_room(count)
        batch, _, heads, head_dim = q.shape
        key_table, value_table = self._tables[layer]
        if count == 1:
            self.keys[layer, :, :, self.length // CHUNK, :, self.length % CHUNK] = k[:, 0]
            self.values[layer, :, :, self.length] = v[:, 0]
        else:
            positions = torch.arange(self.length, end)
            self.keys[layer][:, :, positions // CHUNK, :, positions % CHUNK] = k.transpose(0, 1)
            self.values[layer, :, :, self.length : end] = v.transpose(1, 2)
        if count > MAX_QUERIES:
            return self._by_products(layer, q, end, mask)
        places = self._find_places(end, count)
        chunks = -(-end // CHUNK)
        weights = q[:, :, :, None].expand(-1, -1, -1, chunks, -1).reshape(-1)
        scores = _weighted_sums(key_table, places.key_rows, places.key_bags, weights)
        scores = scores.view(batch, count, heads, chunks * CHUNK)
        if places.unseen is None:
            scores[..., end:] = -torch.inf
        else:
            scores.masked_fill_(places.unseen, -torch.inf)
        if mask is not None:
            scores[..., :end].masked_fill_(~mask[:, None], -torch.inf)
        shares = scores.softmax(dim=-1)[..., :end].reshape(-1)  # whole chunks: a sum's bits depend on its length
        mixed = _weighted_sums(value_table, places.value_rows, places.value_bags, shares)
        return mixed.view(batch, count, heads * head_dim)

    @cached_property
    def _tables(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer as rows of a table."""
        width = self.values.shape[-1]
        return [(k.view(-1, CHUNK), v.view(-1, width)) for k, v in zip(self.keys, self.values, strict=True)]

    def _filled(self) -> list[tuple[Tensor, int]]:
        _, *others = super()._filled()
        return [(self.keys[:, :, :, : -(-self.length // CHUNK)], 1), *others]

    def _by_products(self, layer: int, q: Tensor, end: int, mask: Tensor | None) -> Tensor:
        keys = self.keys[layer].transpose(3, 4).flatten(2, 3)[:, :, :end]  # (B, H, M, D)
        scaled = q.transpose(1, 2) * q.shape[-1] ** 0.5
        mixed = attend(scaled, keys, self.values[layer, :, :, :end], mask, 0.0, mask is None)
        return mixed.transpose(1, 2).flatten(2)

    def _find_places(self, end: int, count: int) -> _Places:
        """The rows to read when `end` tokens are filled, the same for every layer of a pass."""
        _, batch, heads, capacity, head_dim = self.values.shape
        before = self._places[0] if self._places else None
        if before is not None and (before.batch, before.count) != (batch, count):
            before = None
        if before is not None and before.end == end:
            return before
        held, used = self.keys.shape[3], -(-end // CHUNK)
        sequences = torch.arange(batch * heads, dtype=torch.int32).view(batch, 1, heads, 1).expand(-1, count, -1, -1)
        if before is not None and -(-before.end // CHUNK) == used:
            key_rows, key_bags = before.key_rows, before.key_bags
        else:
            key_rows = (sequences * (held * head_dim) + torch.arange(used * head_dim, dtype=torch.int32)).flatten()
            key_bags = torch.arange(0, len(key_rows), head_dim, dtype=torch.int32)
        value_rows = (sequences * capacity + torch.arange(end, dtype=torch.int32)).flatten()
        value_bags = torch.arange(0, len(value_rows), end, dtype=torch.int32)
        unseen = None
        if count > 1:
            unseen = torch.ones((count, used * CHUNK), dtype=torch.bool).triu(1 + end - count)[:, None]
        self._places[:] = [_Places(batch, count, end, key_rows, key_bags, value_rows, value_bags, unseen)]
        return self._places[0]


def _weighted_sums(table: Tensor, rows: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    """For each bag the sum of its rows of the table, weighted; `F.embedding_bag` without its checks."""
    return torch.embedding_bag(table, rows, bags, False, 0, False, weights)[0]


def can_use_bags(device: torch.device) -> bool:
    """Whether a device has the fast kernel: x86 CPUs, through PyTorch's FBGEMM."""
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines
