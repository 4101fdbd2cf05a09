"""The transformer packed for decoding: the same logits as `DALLE.extend`, from fewer and larger operations.

Decoding reads one token a picture, so that the work is small and what surrounds it counts. Packing folds the norms'
weights into the matrices behind them, and query and key norms, rotation and the attention's scale into two tables,
and keeps everything but the logits in one type: about 20 operations a layer instead of 40. On CPUs, matrices are packed
for oneDNN (`layers.packed_linear`) and attention runs at memory speed (`layers.bag_attention`). `DALLE` itself stays
the readable form, and a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.layers.attention import KVCache
from dalle_mini_impl.layers.bag_attention import BagCache, can_use_bags
from dalle_mini_impl.layers.blocks import Block
from dalle_mini_impl.layers.packed_linear import PackedLinear
from dalle_mini_impl.native.trunk import LayerWeights, NativeCache, NativeTrunk, can_run
from dalle_mini_impl.precision import autocast_off


@dataclass(frozen=True)
class _Layer:
    """One block's weights. cos, sin: (L, 2, 1, D), the tables of queries and keys."""

    qkv: PackedLinear
    out: PackedLinear
    up: PackedLinear
    down: PackedLinear
    cos: Tensor
    sin: Tensor
    mixes: tuple[Tensor, Tensor] | None


class Engine:
    """A DALLE for decoding only: `prefill` and `extend` as in `DALLE`, on weights that are copied when it is made.

    dtype: of weights, activations and cache; default that of the model. Logits are float32 in any case: guidance
    enlarges their differences. is_plain: without the CPU's own kernels, in operations that torch.compile can fuse and
    `step_in_place` needs; always so elsewhere. is_native: run whole passes in compiled code (`native`) where that can
    be had. Later changes of the model don't reach it.
    """

    def __init__(
        self,
        dalle: DALLE,
        dtype: torch.dtype | None = None,
        *,
        is_plain: bool = False,
        is_native: bool = True,
    ) -> None:
        self.dalle = dalle
        self.stream = dalle.stream
        self.config = dalle.config
        self.device = dalle.image_head.weight.device
        self.dtype = dtype or dalle.image_head.weight.dtype
        self.is_plain = is_plain or self.device.type != "cpu"
        self._head_dim = dalle.config.dim // dalle.config.heads
        self._native: NativeTrunk | None = None
        self._cache_type = BagCache if can_use_bags(self.device) and not self.is_plain else KVCache
        with torch.no_grad():
            weights = [self._folded(block) for block in dalle.blocks if isinstance(block, Block)]
            head = (dalle.image_head.weight * dalle.final_norm.weight).float().contiguous()
            if is_native and not self.is_plain and can_run(dalle.config, self.device, self.dtype):
                self._cache_type, self._layers = NativeCache, []
                self._native = NativeTrunk(weights, head, dalle.config.heads, self.dtype)
            else:
                self._layers = [self._pack(layer) for layer in weights]
                self._head = PackedLinear(head, is_packed=not self.is_plain)
            self._all_slots = torch.arange(len(dalle.rope_cos), device=self.device)
            self._input_dtype = self.dtype if self._native is None else torch.float32
            self._image_embedding = self._cast(dalle.image_embedding.weight, self._input_dtype)
            places = dalle.place_embedding(0, self.stream.num_image_tokens)  # (N, dim)
            self._places = self._cast(places, self._input_dtype)
            self._neighbours = dalle.neighbours
            if dalle.neighbours is not None:
                self._neighbour_table = self._cast(dalle.neighbours.table.weight, self._input_dtype)

    @property
    def is_native(self) -> bool:
        """Whether whole passes run in compiled code."""
        return self._native is not None

    def _cast(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return weight.detach().to(dtype or self.dtype, copy=True).contiguous()

    def _linear(self, weight: Tensor) -> PackedLinear:
        return PackedLinear(self._cast(weight), is_packed=not self.is_plain)

    def _folded(self, block: Block) -> LayerWeights:
        """A block's weights with those of its norms in them."""
        attention, ffn = block.attention, block.ffn
        cos, sin = self.dalle.rope_cos, self.dalle.rope_sin  # (L, D / 2)
        tables = []
        for norm, scale in ((attention.query_norm, self._head_dim**-0.5), (attention.key_norm, 1.0)):
            first, second = (norm.weight * scale).chunk(2)
            tables.append((torch.cat([first * cos, second * cos], 1), torch.cat([-second * sin, first * sin], 1)))
        attention_shift, ffn_shift = block.attention_shift, block.ffn_shift
        return LayerWeights(
            qkv=attention.qkv.weight * block.attention_norm.weight,
            out=attention.out.weight,
            up=ffn.up.weight * block.ffn_norm.weight,
            down=ffn.down.weight,
            cosines=torch.stack([table[0] for table in tables], dim=1),
            sines=torch.stack([table[1] for table in tables], dim=1),
            mixes=None if attention_shift is None or ffn_shift is None else (attention_shift.mix, ffn_shift.mix),
        )

    def _pack(self, layer: LayerWeights) -> _Layer:
        return _Layer(
            qkv=self._linear(layer.qkv),
            out=self._linear(layer.out),
            up=self._linear(layer.up),
            down=self._linear(layer.down),
            cos=self._cast(layer.cosines[:, :, None]),
            sin=self._cast(layer.sines[:, :, None]),
            mixes=None if layer.mixes is None else (self._cast(layer.mixes[0]), self._cast(layer.mixes[1])),
        )

    @torch.no_grad()
    def prefill(self, text_ids: Tensor, embedding: Tensor | None = None) -> tuple[Tensor, KVCache]:
        """Reads captions (B, t) of t slots once; logits (B, image_vocab) of image id 0 and the filled cache.

        embedding: (B, E) picture embeddings, see `DALLE.forward`.
        """
        self.stream.check_text(text_ids)
        batch, num_slots = text_ids.shape
        cache = self._cache_type.allocate(
            self.config.layers,
            batch,
            self.config.heads,
            self.stream.image_prefix + num_slots + self.stream.num_image_tokens - 1,
            self._head_dim,
            device=self.device,
            dtype=self.dtype,
        )
        with autocast_off(self.device):
            x = self.dalle.embed(text_ids, text_ids[:, :0], None, embedding).to(self._input_dtype)
            slots = self.stream.prompt_slots(num_slots, self.device)
            if self._native is not None:
                assert isinstance(cache, NativeCache)
                logits = self._native(x, slots, cache, only_last=True)[:, 0]
            else:
                hidden = self._trunk(x, slots, cache, self.dalle.drawing_masks(num_slots, 0))
                logits = self._logits(hidden[:, -1])
            cache.prompt_length = x.shape[1]
            return logits, cache

    @torch.no_grad()
    def extend(self, image_ids: Tensor, cache: KVCache) -> Tensor:
        """Reads the n image ids (B, n) that follow those in the cache; logits (B, n, image_vocab); see `DALLE`."""
        start = self.dalle.check_extension(image_ids, cache)
        with autocast_off(self.device):
            x = self._image_embedding[image_ids] + self._places[start + 1 : start + 1 + image_ids.shape[1]]
            if self._neighbours is not None:
                ids = self.dalle.read(image_ids, start, cache)
                x = x + self._told(self._neighbours.rows(ids, start + 1, start + 1 + image_ids.shape[1]))
            x = self.dalle.with_view(x, None)
            slots = slice(self.stream.text_length + start, self.stream.text_length + start + x.shape[1])
            if self._native is not None:
                assert isinstance(cache, NativeCache)
                return self._native(x, self._all_slots[slots], cache)
            masks = self.dalle.masks(slots.start, slots.stop, cache.length)
            return self._logits(self._trunk(x.to(self._input_dtype), slots, cache, masks))

    @torch.no_grad()
    def step_in_place(self, ids: Tensor, cell: Tensor, cache: KVCache) -> Tensor:
        """Reads one id (B,) at a cell (1,) int64 that only the device knows; logits (B, image_vocab) of the next.

        No shape depends on the cell, so that one CUDA graph, or one compiled function, serves every step: attention
        goes over the whole capacity of the cache, and its length is left to the caller.
        """
        with autocast_off(self.device):
            x = self._image_embedding[ids] + self._places.index_select(0, cell + 1)  # (B, dim)
            if self._neighbours is not None:
                cache.ids.index_copy_(1, cell, ids[:, None])
                x = x + self._told(self._neighbours.rows_at(cache.ids, cell + 1))
            x = self.dalle.with_view(x[:, None], None).to(self.dtype)
            slot, place = self.stream.text_length + cell, cache.prompt_length + cell
            is_later = torch.arange(cache.capacity, device=self.device) > place
            bias = torch.zeros(cache.capacity, 1, device=self.device, dtype=self.dtype)
            bias = bias.masked_fill(is_later[:, None], -torch.inf)
            first = self.stream.text_length - cache.prompt_length
            masks = self.dalle.masks(first, first + cache.capacity)  # of all queries

            def mix(index: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
                keys, values = cache.keys[index], cache.values[index]
                keys.index_copy_(2, place, k.transpose(1, 2))
                values.index_copy_(2, place, v.transpose(1, 2))
                scores = keys @ q.transpose(1, 2).mT + bias  # (B, H, M, 1)
                if mask is not None:
                    scores = scores.masked_fill(~mask.index_select(0, place).mT, -torch.inf)
                return (scores.softmax(dim=2).mT @ values).transpose(1, 2).flatten(2)

            for index, layer in enumerate(self._layers):
                tables = layer.cos.index_select(0, slot), layer.sin.index_select(0, slot)
                x = self._block(layer, index, x, tables, cache, mix, masks[index])
            return self._logits(self._norm(x)[:, 0])

    def _trunk(self, x: Tensor, slots: Tensor | slice, cache: KVCache, masks: Sequence[Tensor | None]) -> Tensor:
        """All layers and the last norm, over x (B, n, dim) whose tokens stand in `slots`; masks: see `DALLE.masks`."""
        for index, layer in enumerate(self._layers):
            x = self._block(layer, index, x, (layer.cos[slots], layer.sin[slots]), cache, cache.mix, masks[index])
        cache.advance(x.shape[1])
        return self._norm(x)

    def _told(self, rows: Tensor) -> Tensor:
        """What is told of cells with neighbours in these rows (…, K) of the table, (…, dim)."""
        return self._neighbour_table[rows].sum(dim=-2)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden.float())

    @staticmethod
    def _norm(x: Tensor) -> Tensor:
        return torch.layer_norm(x, x.shape[-1:], eps=1e-6)

    def _block(
        self,
        layer: _Layer,
        index: int,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        cache: KVCache,
        mix: Callable[[int, Tensor, Tensor, Tensor, Tensor | None], Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """One block over x (B, n, dim). mix: attention over the cache, as `KVCache.mix`; mask: its last argument."""
        batch, count, _ = x.shape
        heads, head_dim = self.config.heads, self._head_dim
        qkv = layer.qkv(self._norm_and_shift(layer, index, 0, x, cache)).view(batch, count, 3, heads, head_dim)
        qk = torch.layer_norm(qkv, (head_dim,), eps=1e-6)[:, :, :2]  # with the values: whole, it needs no copy
        qk = torch.addcmul(qk * tables[0], qk.roll(head_dim // 2, dims=-1), tables[1])
        x = layer.out.plus(mix(index, qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2], mask), x)
        h = self._norm_and_shift(layer, index, 1, x, cache)
        if self.config.ffn == "swiglu":
            gate, value = layer.up(h).chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        elif self.config.ffn == "gelu":
            hidden = F.gelu(layer.up(h))
        else:
            hidden = layer.up.relu(h).square_()
        return layer.down.plus(hidden, x)

    def _norm_and_shift(self, layer: _Layer, index: int, which: int, x: Tensor, cache: KVCache) -> Tensor:
        h = self._norm(x)
        if layer.mixes is None:
            return h
        mix = layer.mixes[which]
        if h.shape[1] == 1:
            return cache.shift_one(index, which, h, mix)
        previous = torch.cat([cache.shift(index, which, h)[:, None], h[:, :-1]], dim=1)
        return torch.lerp(h, previous, mix)
