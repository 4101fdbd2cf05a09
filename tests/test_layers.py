"""Faults of transformers forbidden here: caches that overflow or mix rows, masks that leak, norms that drift."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_mini_impl.layers.attention import Attention, KVCache, attend
from dalle_mini_impl.layers.blocks import Block, FeedForward, squared_relu
from dalle_mini_impl.layers.rope import rotate, stream_angles
from dalle_mini_impl.layers.shift import TokenShift
from dalle_mini_impl.stream import Stream
from tests.tiny import randomize

DIM, HEADS, LENGTH = 16, 2, 7


def _attention(causal: bool = True) -> Attention:
    attention = Attention(DIM, HEADS, causal=causal)
    randomize(attention)
    return attention.eval()


def _cache(batch: int = 2, capacity: int = LENGTH) -> KVCache:
    return KVCache.allocate(1, batch, HEADS, capacity, DIM // HEADS)


def _rope(length: int = LENGTH) -> tuple[Tensor, Tensor]:
    angles = torch.randn(length, DIM // HEADS // 2)
    return angles.cos(), angles.sin()


def _slow_attention(attention: Attention, x: Tensor, rope: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
    """One query and one head at a time; seen: (B, L, L) bool, True where query i may see key j."""
    projected = attention.qkv(x).view(*x.shape[:2], 3, HEADS, -1)
    mixed = torch.zeros(*x.shape[:2], HEADS, DIM // HEADS)
    for b in range(x.shape[0]):
        for h in range(HEADS):
            query = rotate(attention.query_norm(projected[b, :, 0, h]), *rope)
            key = rotate(attention.key_norm(projected[b, :, 1, h]), *rope)
            for i in range(x.shape[1]):
                keys = [j for j in range(x.shape[1]) if seen[b, i, j]]
                weights = torch.stack([query[i] @ key[j] for j in keys]).div((DIM // HEADS) ** 0.5).softmax(dim=0)
                mixed[b, i, h] = sum(w * projected[b, j, 2, h] for w, j in zip(weights, keys, strict=True))
    out: Tensor = attention.out(mixed.flatten(2))
    return out


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_a_loop_over_queries(causal: bool) -> None:
    attention, x, rope = _attention(causal), torch.randn(2, LENGTH, DIM), _rope()
    seen = torch.ones(2, LENGTH, LENGTH, dtype=torch.bool)
    expected = _slow_attention(attention, x, rope, seen.tril() if causal else seen)
    assert torch.allclose(attention(x, rope), expected, atol=1e-5)


@torch.no_grad()
def test_a_masked_key_is_never_seen() -> None:
    attention, x, rope = _attention(causal=False), torch.randn(2, LENGTH, DIM), _rope()
    real = torch.tensor([[True] * 5 + [False] * 2, [True] * LENGTH])
    out = attention(x, rope, real[:, None, None, :])
    assert torch.allclose(out, _slow_attention(attention, x, rope, real[:, None, :].expand(-1, LENGTH, -1)), atol=1e-5)
    x[0, 5:] += 100
    assert torch.equal(attention(x, rope, real[:, None, None, :])[0, :5], out[0, :5])


@torch.no_grad()
@pytest.mark.parametrize("prefilled", [1, 4, LENGTH])
def test_cached_attention_equals_uncached(prefilled: int) -> None:
    attention, x, (cos, sin) = _attention(), torch.randn(2, LENGTH, DIM), _rope()
    expected = attention(x, (cos, sin))
    cache = _cache()
    parts = [attention(x[:, :prefilled], (cos[:prefilled], sin[:prefilled]), cache=cache)]
    cache.advance(prefilled)
    for i in range(prefilled, LENGTH):
        parts.append(attention(x[:, i : i + 1], (cos[i : i + 1], sin[i : i + 1]), cache=cache))
        cache.advance(1)
    assert cache.length == cache.capacity == LENGTH
    assert torch.allclose(torch.cat(parts, dim=1), expected, atol=1e-6)


@pytest.mark.parametrize(("queries", "is_causal"), [(LENGTH, True), (LENGTH, False), (1, False)])
def test_short_bf16_attention_equals_the_fused_kernel(queries: int, is_causal: bool) -> None:
    q, k, v = (torch.randn(2, HEADS, length, 8, requires_grad=True) for length in (queries, LENGTH, LENGTH))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    mixed = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, 0.0, is_causal)
    assert mixed.dtype == torch.bfloat16
    assert torch.allclose(mixed.float(), expected, atol=0.05)
    weights = torch.randn_like(expected)
    right = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    ours = torch.autograd.grad((mixed * weights).sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=0.1) for a, b in zip(ours, right, strict=True))


@torch.no_grad()
def test_token_shift_mixes_neighbours_and_nothing_else() -> None:
    shift, x = TokenShift(DIM), torch.randn(2, LENGTH, DIM)
    mixed = shift(x)
    for i in range(LENGTH):
        before = x[:, i - 1] if i else torch.zeros(2, DIM)
        assert torch.allclose(mixed[:, i], (1 - shift.mix) * x[:, i] + shift.mix * before, atol=1e-6)
    assert torch.allclose(shift(x[:, 3:], before=x[:, 2]), mixed[:, 3:], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("prefilled", [1, 4])
def test_a_cached_block_with_token_shift_equals_an_uncached_one(prefilled: int) -> None:
    block, x, (cos, sin) = Block(DIM, HEADS, causal=True, token_shift=True), torch.randn(2, LENGTH, DIM), _rope()
    randomize(block)
    expected = block(x, (cos, sin))
    cache = _cache()
    parts = [block(x[:, :prefilled], (cos[:prefilled], sin[:prefilled]), cache=cache)]
    cache.advance(prefilled)
    cache = cache.select(torch.tensor([1, 0])).select(torch.tensor([1, 0]))  # rows take what shifts read with them
    for i in range(prefilled, LENGTH):
        parts.append(block(x[:, i : i + 1], (cos[i : i + 1], sin[i : i + 1]), cache=cache))
        cache.advance(1)
    assert torch.allclose(torch.cat(parts, dim=1), expected, atol=1e-6)


def test_a_full_cache_is_an_error_and_not_a_wrap_around() -> None:
    cache = _cache(capacity=3)
    entry = torch.randn(2, HEADS, 2, DIM // HEADS)
    cache.append(0, entry, entry)
    cache.advance(2)
    with pytest.raises(ValueError, match="holds 3 tokens; 4 were asked for"):
        cache.append(0, entry, entry)


def test_rows_of_a_cache_are_copied_in_order_and_apart() -> None:
    cache = _cache(batch=3, capacity=4)
    entry = torch.randn(3, HEADS, 2, DIM // HEADS)
    cache.append(0, entry, -entry)
    cache.advance(2)
    picked = cache.select(torch.tensor([2, 0]))
    assert picked.length == 2
    assert torch.equal(picked.keys[0, :, :, :2], entry[[2, 0]])
    assert torch.equal(picked.values[0, :, :, :2], -entry[[2, 0]])
    copies = cache.expand(2)
    assert torch.equal(copies.keys[0, :, :, :2], entry[[0, 0, 1, 1, 2, 2]])
    copies.append(0, torch.ones(6, HEADS, 1, DIM // HEADS), torch.ones(6, HEADS, 1, DIM // HEADS))
    copies.advance(1)
    assert (copies.length, cache.length) == (3, 2)
    assert torch.equal(cache.keys[0, :, :, :2], entry) and not cache.keys[0, :, :, 2:].any()


def test_a_width_that_heads_dont_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="15 is not a multiple of its 2 heads"):
        Attention(15, 2, causal=True)


def test_rotation_keeps_norms() -> None:
    stream = Stream(text_length=5, grid_size=4, text_vocab=10, image_vocab=10)
    angles = stream_angles(stream, 16)
    assert angles.shape == (stream.num_inputs + 1, 8)
    x = torch.randn(3, stream.num_inputs + 1, 16)
    rotated = rotate(x, angles.cos(), angles.sin())
    assert torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert not torch.allclose(rotated[:, 0], x[:, 0])


def test_rotated_products_depend_on_the_difference_of_positions_alone() -> None:
    def product(i: float, j: float) -> float:
        turned = [rotate(x[None], (p * speeds).cos(), (p * speeds).sin()) for x, p in ((query, i), (key, j))]
        return (turned[0] * turned[1]).sum().item()

    query, key = torch.randn(2, 16)
    speeds = torch.rand(1, 8)
    assert product(7, 3) == pytest.approx(product(4, 0), abs=1e-4)
    assert product(7, 3) != pytest.approx(product(3, 7), abs=1e-2)  # before is not behind


@pytest.mark.parametrize("text_length", [2, 9, 64])
def test_angles_of_the_grid_ignore_the_length_of_the_text(text_length: int) -> None:
    sizes = {"grid_size": 3, "text_vocab": 10, "image_vocab": 10}
    angles = stream_angles(Stream(text_length=text_length, **sizes), 8)
    reference = stream_angles(Stream(text_length=5, **sizes), 8)
    assert torch.equal(angles[text_length:], reference[5:])
    assert torch.equal(angles[text_length - 1], reference[4])  # the last text slot touches the grid's corner
    assert len(angles.unique(dim=0)) == len(angles)  # no two slots stand at the same place
    assert bool(angles[:text_length].abs().sum(dim=1).gt(0).all())  # and no text at angle 0


@pytest.mark.parametrize("kind", ["relu2", "swiglu", "gelu"])
def test_feed_forward_follows_its_formula(kind: str) -> None:
    ffn = FeedForward(DIM, kind, 4.0)  # type: ignore[arg-type]
    randomize(ffn)
    x = torch.randn(3, DIM)
    up = x @ ffn.up.weight.t()
    if kind == "relu2":
        hidden = up.clamp(min=0) ** 2
    elif kind == "gelu":
        hidden = up * torch.special.ndtr(up)
    else:
        gate, value = up[:, : up.shape[1] // 2], up[:, up.shape[1] // 2 :]
        hidden = gate * torch.sigmoid(gate) * value
    assert hidden.shape == (3, 64)
    assert torch.allclose(ffn(x), hidden @ ffn.down.weight.t(), atol=1e-4)


def test_a_fresh_block_is_the_identity_and_dropout_ends_with_training() -> None:
    x = torch.randn(2, LENGTH, DIM)
    assert torch.equal(Block(DIM, HEADS, causal=True)(x), x)
    block = Block(DIM, HEADS, causal=True, dropout=0.5)
    randomize(block)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_squared_relu_has_the_gradient_of_its_formula() -> None:
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(squared_relu, (x,))
    assert torch.equal(squared_relu(x), torch.relu(x).square())
