"""The transformer packed for decoding: the same logits as `DALLE.extend`, from fewer and larger operations.

Decoding reads one token a picture, so that the work is small and what surrounds it counts. Packing folds the norms'
weights into the matrices behind them, and query and key norms, rotation and the attention's scale into two tables,
and keeps everything in one type: about 20 operations a layer instead of 40. `DALLE` itself stays the readable form,
and a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.layers.attention import KVCache, attend
from dalle_mini_impl.layers.blocks import Block, squared_relu


@dataclass(frozen=True)
class _Layer:
    """One block's weights. cos, sin: (L, 2, 1, D), the tables of queries and keys."""

    qkv: Tensor
    out: Tensor
    up: Tensor
    down: Tensor
    cos: Tensor
    sin: Tensor
    mixes: tuple[Tensor, Tensor] | None


class Engine:
    """A DALLE for decoding only: `prefill` and `extend` as in `DALLE`, on weights that are copied when it is made.

    dtype: of weights, activations and cache; default that of the model. Later changes of the model don't reach it.
    """

    def __init__(self, dalle: DALLE, dtype: torch.dtype | None = None) -> None:
        self.dalle = dalle
        self.stream = dalle.stream
        self.config = dalle.config
        self.device = dalle.image_head.weight.device
        self.dtype = dtype or dalle.image_head.weight.dtype
        self._head_dim = dalle.config.dim // dalle.config.heads
        with torch.no_grad():
            self._layers = [self._pack(block) for block in dalle.blocks if isinstance(block, Block)]
            self._head = self._cast(dalle.image_head.weight * dalle.final_norm.weight)
            self._image_embedding = self._cast(dalle.image_embedding.weight)
            cells = torch.arange(self.stream.num_image_tokens, device=self.device)
            size = self.stream.grid_size
            self._targets = self._cast(dalle.target_row(cells // size) + dalle.target_column(cells % size))  # (N, dim)

    def _cast(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype, copy=True).contiguous()

    def _pack(self, block: Block) -> _Layer:
        attention, ffn = block.attention, block.ffn
        cos, sin = self.dalle.rope_cos, self.dalle.rope_sin  # (L, D / 2)
        tables = []
        for norm, scale in ((attention.query_norm, self._head_dim**-0.5), (attention.key_norm, 1.0)):
            first, second = (norm.weight * scale).chunk(2)
            tables.append((torch.cat([first * cos, second * cos], 1), torch.cat([-second * sin, first * sin], 1)))
        shifts = block.attention_shift, block.ffn_shift
        return _Layer(
            qkv=self._cast(attention.qkv.weight * block.attention_norm.weight),
            out=self._cast(attention.out.weight),
            up=self._cast(ffn.up.weight * block.ffn_norm.weight),
            down=self._cast(ffn.down.weight),
            cos=self._cast(torch.stack([table[0] for table in tables], dim=1)[:, :, None]),
            sin=self._cast(torch.stack([table[1] for table in tables], dim=1)[:, :, None]),
            mixes=None if None in shifts else tuple(self._cast(shift.mix) for shift in shifts if shift is not None),  # type: ignore[arg-type]
        )

    @torch.no_grad()
    def prefill(self, text_ids: Tensor) -> tuple[Tensor, KVCache]:
        """Reads captions (B, t) of t slots once; logits (B, image_vocab) of image id 0 and the filled cache."""
        self.stream.check_text(text_ids)
        batch, num_slots = text_ids.shape
        cache = KVCache.allocate(
            len(self._layers),
            batch,
            self.config.heads,
            num_slots + self.stream.num_image_tokens - 1,
            self._head_dim,
            device=self.device,
            dtype=self.dtype,
        )
        with torch.autocast(self.device.type, enabled=False):
            x = self.dalle.embed(text_ids, text_ids[:, :0]).to(self.dtype)
            hidden = self._trunk(x, self.stream.text_length - num_slots, cache)
            cache.prompt_length = num_slots
            return F.linear(hidden[:, -1], self._head), cache

    @torch.no_grad()
    def extend(self, image_ids: Tensor, cache: KVCache) -> Tensor:
        """Reads the n image ids (B, n) that follow those in the cache; logits (B, n, image_vocab); see `DALLE`."""
        start = self.dalle.check_extension(image_ids, cache)
        with torch.autocast(self.device.type, enabled=False):
            x = self._image_embedding[image_ids] + self._targets[start + 1 : start + 1 + image_ids.shape[1]]
            x = self.dalle.with_view(x, None)
            return F.linear(self._trunk(x.to(self.dtype), self.stream.text_length + start, cache), self._head)

    @torch.no_grad()
    def step_in_place(self, ids: Tensor, cell: Tensor, cache: KVCache) -> Tensor:
        """Reads one id (B,) at a cell (1,) int64 that only the device knows; logits (B, image_vocab) of the next.

        No shape depends on the cell, so that one CUDA graph, or one compiled function, serves every step: attention
        goes over the whole capacity of the cache, and its length is left to the caller.
        """
        with torch.autocast(self.device.type, enabled=False):
            x = self._image_embedding[ids] + self._targets.index_select(0, cell + 1)  # (B, dim)
            x = self.dalle.with_view(x[:, None], None).to(self.dtype)
            slot, place = self.stream.text_length + cell, cache.prompt_length + cell
            is_later = torch.arange(cache.capacity, device=self.device) > place
            bias = torch.zeros(cache.capacity, 1, device=self.device, dtype=self.dtype)
            bias = bias.masked_fill(is_later[:, None], -torch.inf)

            def remember(index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
                cache.keys[index].index_copy_(2, place, keys)
                cache.values[index].index_copy_(2, place, values)
                return cache.keys[index], cache.values[index]

            for index, layer in enumerate(self._layers):
                tables = layer.cos.index_select(0, slot), layer.sin.index_select(0, slot)
                x = self._block(layer, index, x, tables, cache, remember, bias)
            return F.linear(self._last_norm(x)[:, 0], self._head)

    def _trunk(self, x: Tensor, slot: int, cache: KVCache) -> Tensor:
        """All layers and the last norm, over x (B, n, dim) whose first token stands in `slot`."""
        for index, layer in enumerate(self._layers):
            slots = slice(slot, slot + x.shape[1])
            x = self._block(layer, index, x, (layer.cos[slots], layer.sin[slots]), cache, cache.append, None)
        cache.advance(x.shape[1])
        return self._last_norm(x)

    @staticmethod
    def _last_norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    def _block(
        self,
        layer: _Layer,
        index: int,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        cache: KVCache,
        remember: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]],
        bias: Tensor | None,
    ) -> Tensor:
        """One block. remember: takes new keys and values, gives those to attend to. bias: (M, 1), added to scores."""
        batch, count, dim = x.shape
        heads, head_dim = self.config.heads, self._head_dim
        h = self._norm_and_shift(layer, index, 0, x, cache)
        qkv = F.linear(h, layer.qkv).view(batch, count, 3, heads, head_dim)
        qk = F.layer_norm(qkv[:, :, :2], (head_dim,), eps=1e-6)  # (B, n, 2, H, D)
        qk = torch.addcmul(qk * tables[0], qk.roll(head_dim // 2, dims=-1), tables[1])
        q, k = qk.transpose(1, 3).unbind(dim=2)  # (B, H, n, D), q scaled already
        keys, values = remember(index, k, qkv[:, :, 2].transpose(1, 2))
        if count == 1:
            scores = keys @ q.mT  # (B, H, M, 1)
            mixed = (scores if bias is None else scores + bias).softmax(dim=2).mT @ values
        else:
            mixed = attend(q * head_dim**0.5, keys, values, None, 0.0, True)
        x = x + F.linear(mixed.transpose(1, 2).reshape(batch, count, dim), layer.out)
        hidden = F.linear(self._norm_and_shift(layer, index, 1, x, cache), layer.up)
        if self.config.ffn == "swiglu":
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = squared_relu(hidden)
        return x + F.linear(hidden, layer.down)

    def _norm_and_shift(self, layer: _Layer, index: int, which: int, x: Tensor, cache: KVCache) -> Tensor:
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        if layer.mixes is None:
            return h
        before = cache.shift(index, which, h)[:, None]
        previous = before if h.shape[1] == 1 else torch.cat([before, h[:, :-1]], dim=1)
        return torch.lerp(h, previous, layer.mixes[which])
