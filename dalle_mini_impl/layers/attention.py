"""One attention for every transformer here, with its preallocated KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle_mini_impl.layers.native_attention import attend as attend_natively
from dalle_mini_impl.layers.native_attention import can_attend
from dalle_mini_impl.layers.norm import Norm
from dalle_mini_impl.layers.rope import rotate


@dataclass
class KVCache:
    """Keys and values of every layer, preallocated: two tensors (layers, B, H, capacity, D).

    last: (layers, 2, B, dim), the last token as each layer's two token shifts read it. ids: (B, capacity) int64, the
    image ids that were read, for embeddings that look back at them. length: tokens that are filled. prompt_length: how
    many of them were there before the first decoded one. Several tokens can be appended at once, and as many of the
    latest taken back.
    """

    keys: Tensor
    values: Tensor
    last: Tensor
    ids: Tensor
    length: int = 0
    prompt_length: int = 0
    latest: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)
    """By layer and shift: (B, n + 1, dim), the latest n > 1 tokens appended at once and the one ahead of them."""
    _room: ClassVar[Callable[..., Tensor]] = staticmethod(torch.zeros)
    _last_dtype: ClassVar[torch.dtype | None] = None  # of `last`; None: that of keys and values

    @classmethod
    def allocate(
        cls,
        layers: int,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """An empty cache."""
        sizes = layers, batch, heads, capacity, head_dim
        return cls(
            keys=cls._room(cls._keys_shape(*sizes), device=device, dtype=dtype),
            values=cls._room(sizes, device=device, dtype=dtype),
            last=torch.zeros((layers, 2, batch, heads * head_dim), device=device, dtype=cls._last_dtype or dtype),
            ids=torch.zeros((batch, capacity), device=device, dtype=torch.long),
        )

    @staticmethod
    def _keys_shape(layers: int, batch: int, heads: int, capacity: int, head_dim: int) -> tuple[int, ...]:
        return layers, batch, heads, capacity, head_dim

    @property
    def capacity(self) -> int:
        """Most tokens it holds."""
        return self.values.shape[3]

    def select(self, rows: Tensor) -> Self:
        """A new cache whose row i is row rows[i] of this one; rows (n,) int64, repeats allowed."""
        chosen = self._emptied(len(rows))
        for (ours, dim), (theirs, _) in zip(chosen._filled(), self._filled(), strict=True):
            ours.copy_(theirs.index_select(dim, rows))
        return chosen

    def expand(self, copies: int) -> Self:
        """A new cache with each row repeated `copies` times in a run: prefill once, draw many candidates."""
        return self.select(torch.arange(self.values.shape[1], device=self.values.device).repeat_interleave(copies))

    def beside(self, other: KVCache) -> Self:
        """A new cache with this one's rows and then the other's, which holds as many tokens."""
        if (self.length, self.prompt_length) != (other.length, other.prompt_length):
            raise ValueError(f"caches of {self.length} and {other.length} tokens can't be one")
        num_rows, num_others = self.values.shape[1], other.values.shape[1]
        both = self._emptied(num_rows + num_others)
        for (ours, dim), (first, _), (second, _) in zip(both._filled(), self._filled(), other._filled(), strict=True):
            ours.narrow(dim, 0, num_rows).copy_(first)
            ours.narrow(dim, num_rows, num_others).copy_(second)
        return both

    def _emptied(self, batch: int) -> Self:
        """A cache for so many rows, as long as this one, whose numbers are still to be copied."""
        layers, _, heads, capacity, head_dim = self.values.shape
        cache = self.allocate(
            layers, batch, heads, capacity, head_dim, device=self.values.device, dtype=self.values.dtype
        )
        cache.length, cache.prompt_length = self.length, self.prompt_length
        return cache

    def _filled(self) -> list[tuple[Tensor, int]]:
        """What has been written, as views, each with the dimension that its rows are counted in."""
        filled = slice(0, self.length)
        return [(self.keys[:, :, :, filled], 1), (self.values[:, :, :, filled], 1), (self.last, 2), (self.ids, 0)]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (B, H, n, D) keys and values behind the filled length; returns all keys and values of the layer.

        `length` itself moves once a step, by `advance`, when every layer has written.
        """
        end = self.check_room(keys.shape[2])
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def check_room(self, tokens: int) -> int:
        """The length with so many tokens more; ValueError where they don't fit."""
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"the KV cache holds {self.capacity} tokens; {self.length + tokens} were asked for: allocate more"
            )
        return self.length + tokens

    def mix(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Appends n tokens and lets them attend to all up to their own; q, k, v (B, n, H, D) to (B, n, H * D).

        q is scaled already. mask: (n, length + n) bool, True where a token may be seen, if that isn't all up to a
        token's own.
        """
        keys, values = self.append(layer, k.transpose(1, 2), v.transpose(1, 2))
        q = q.transpose(1, 2)
        if q.shape[2] == 1:
            scores = keys @ q.mT  # (B, H, M, 1)
            if mask is not None:
                scores = scores.masked_fill(~mask.mT, -torch.inf)
            mixed = scores.softmax(dim=2).mT @ values
        else:
            mixed = attend(q * q.shape[-1] ** 0.5, keys, values, mask, 0.0, mask is None)
        return mixed.transpose(1, 2).flatten(2)

    def shift_one(self, layer: int, which: int, x: Tensor, mix: Tensor) -> Tensor:
        """One token x (B, 1, dim) mixed with the one ahead of it, whose place it takes; mix (dim,)."""
        before = self.last[layer, which]
        mixed = torch.lerp(x, before[:, None], mix)
        before.copy_(x[:, 0])
        self.latest.clear()
        return mixed

    def shift(self, layer: int, which: int, x: Tensor) -> Tensor:
        """The token (B, dim) ahead of the new ones x (B, n, dim), whose last one takes its place."""
        before = self.last[layer, which].to(x.dtype, copy=True)
        self.last[layer, which] = x[:, -1]
        if x.shape[1] > 1:
            self.latest[layer, which] = torch.cat([before[:, None], x], dim=1)
        else:
            self.latest.clear()
        return before

    def advance(self, tokens: int) -> None:
        """Counts tokens that every layer has written."""
        self.length += tokens

    def take_back(self, tokens: int) -> None:
        """Forgets the last `tokens` of those that were appended at once: the next ones are written over them."""
        self.length -= tokens
        for (layer, which), x in self.latest.items():
            self.last[layer, which] = x[:, -1 - tokens]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, is_causal: bool) -> Tensor:
    """Scaled dot-product attention of (B, H, L, D) queries over (B, H, M, D) keys and values.

    is_causal: the queries are those of the last L keys, and none sees a later key. mask: bool, True where a key may be
    seen, (L, M) or with dimensions for batch and heads; it stands alone, without is_causal.
    On the CPU in bf16 the fused kernel is slow, with one query and in its backward pass; short streams run 3 times
    faster as two batched products and a softmax.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    is_short = num_keys <= 512 and (mask is None or mask.ndim == 2)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and is_short and not dropout:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, L, M)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        if is_causal:
            future = torch.full((num_queries, num_keys), -torch.inf, dtype=scores.dtype, device=scores.device)
            scores = scores + future.triu(1 + num_keys - num_queries)
        mixed: Tensor = scores.softmax(dim=-1) @ v
        return mixed
    if is_causal and num_queries < num_keys:  # the kernel's own mask would count the queries from the first key
        mask = torch.ones((num_queries, num_keys), dtype=torch.bool, device=q.device).tril(num_keys - num_queries)
        is_causal = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)


class Attention(nn.Module):
    """Multi-head self-attention with QK-norm, through scaled_dot_product_attention."""

    def __init__(self, dim: int, heads: int, *, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"attention width {dim} is not a multiple of its {heads} heads")
        self.heads = heads
        self.head_dim = dim // heads
        self.causal = causal
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.query_norm = Norm(self.head_dim)
        self.key_norm = Norm(self.head_dim)
        nn.init.zeros_(self.out.weight)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Mixes x, (B, L, dim), over its tokens and those in the cache.

        rope: cos and sin, (L, D/2), of the positions of x. mask: bool, True where a key may be seen, in place of the
        causal one: (L, M) for M keys, those in the cache first, or, without a cache, (B, 1, 1, L). cache: holds the
        tokens before x, and then those of x, too.
        """
        qkv = self.qkv(x)
        dropout = self.dropout if self.training else 0.0
        is_whole = cache is None and mask is None and not dropout and (rope is None or rope[0].ndim == 2)
        # evaluation in fp32 is what all that is compiled is compared with, so it keeps to PyTorch's operations
        is_wanted = self.training or qkv.dtype != torch.float32
        if is_whole and is_wanted and can_attend(qkv, self.heads):
            weights = self.query_norm.weight, self.key_norm.weight
            out: Tensor = self.out(attend_natively(qkv, *weights, rope, self.heads, self.causal))
            return out
        q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=self.heads)
        q, k = self.query_norm(q), self.key_norm(k)  # (B, H, L, D)
        if rope is not None:
            cos, sin = (table.to(q.dtype) for table in rope)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        is_causal = self.causal and x.shape[1] > 1 and mask is None
        mixed = attend(q, k.to(q.dtype), v.to(q.dtype), mask, dropout, is_causal)
        out = self.out(rearrange(mixed, "b h l d -> b l (h d)"))
        return out
