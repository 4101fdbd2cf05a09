"""Attention by embedding bags is attention, and doesn't depend on what else is in the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.layers.attention import KVCache
from dalle_mini_impl.layers.bag_attention import CHUNK, MAX_QUERIES, BagCache

HEADS, DIM, CAPACITY = 3, 8, 2 * CHUNK + 20


def _tokens(batch: int, count: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, count, HEADS, DIM, generator=generator).to(dtype)
    return q * DIM**-0.5, k, v


def _caches(batch: int, dtype: torch.dtype = torch.float32) -> tuple[KVCache, BagCache]:
    return (
        KVCache.allocate(2, batch, HEADS, CAPACITY, DIM, dtype=dtype),
        BagCache.allocate(2, batch, HEADS, CAPACITY, DIM, dtype=dtype),
    )


@pytest.mark.parametrize(
    "counts",
    [[1] * CAPACITY, [CAPACITY], [CHUNK - 1, 1, 1, 1, MAX_QUERIES, 2, 40], [5, MAX_QUERIES + 1, 1, 60, 7]],
    ids=["one by one", "at once", "around a chunk", "mixed"],
)
def test_bags_mix_what_products_mix(counts: list[int]) -> None:
    plain, bags = _caches(2)
    for number, count in enumerate(counts):
        for layer in range(2):
            q, k, v = _tokens(2, count, 2 * number + layer)
            mixed = bags.mix(layer, q, k, v)
            assert mixed.shape == (2, count, HEADS * DIM)
            assert torch.allclose(mixed, plain.mix(layer, q, k, v), atol=1e-5)
        for cache in (plain, bags):
            cache.advance(count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_a_row_are_those_it_has_alone(dtype: torch.dtype) -> None:
    _, together = _caches(5, dtype)
    alone = together.select(torch.tensor([3]))
    for number, count in enumerate([9, 1, 1, 70, 1, 4]):
        q, k, v = _tokens(5, count, number, dtype)
        mixed = together.mix(0, q, k, v)
        single = alone.mix(0, q[3:4], k[3:4], v[3:4])
        if count <= MAX_QUERIES:
            assert torch.equal(mixed[3:4], single)
        together.advance(count)
        alone.advance(count)


def test_several_queries_get_the_bits_of_one_by_one() -> None:
    """Even where the first of them end a chunk and the others begin one."""
    _, several = _caches(2, torch.bfloat16)
    several.mix(0, *_tokens(2, CHUNK - 3, 1, torch.bfloat16))
    several.advance(CHUNK - 3)
    one_by_one = several.select(torch.arange(2))
    q, k, v = _tokens(2, 6, 0, torch.bfloat16)
    mixed = several.mix(0, q, k, v)
    for place in range(6):
        part = slice(place, place + 1)
        assert torch.equal(one_by_one.mix(0, q[:, part], k[:, part], v[:, part]), mixed[:, part])
        one_by_one.advance(1)


def test_tokens_taken_back_are_written_over() -> None:
    plain, bags = _caches(2)
    for cache in (plain, bags):
        cache.mix(0, *_tokens(2, 8, 0))
        cache.advance(8)
        cache.take_back(5)
    q, k, v = _tokens(2, 1, 1)
    assert torch.allclose(bags.mix(0, q, k, v), plain.mix(0, q, k, v), atol=1e-5)


def test_rows_are_selected_and_put_beside_each_other() -> None:
    _, first = _caches(2)
    first.mix(0, *_tokens(2, 3, 0))
    first.advance(3)
    both = first.select(torch.tensor([1, 1, 0])).beside(first)
    q, k, v = _tokens(1, 1, 1)
    mixed = both.mix(0, *(part.expand(5, -1, -1, -1) for part in (q, k, v)))
    assert torch.equal(mixed[0], mixed[1]) and torch.equal(mixed[0], mixed[4]) and torch.equal(mixed[2], mixed[3])
    assert not torch.equal(mixed[0], mixed[2])


def test_a_full_cache_is_told() -> None:
    _, bags = _caches(1)
    bags.advance(CAPACITY)
    with pytest.raises(ValueError, match=f"holds {CAPACITY} tokens; {CAPACITY + 1} were asked for"):
        bags.mix(0, *_tokens(1, 1, 0))
