"""The transformer's trunk and head in compiled code (`decode.cpp`): a whole pass is one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_mini_impl.config import DALLEConfig
from dalle_mini_impl.layers.attention import KVCache
from dalle_mini_impl.native.kernel import kernel


def lanes() -> int:
    """Numbers in a vector of the kernel's; dimensions of heads, and so of the model, are whole vectors."""
    library = kernel()
    assert library is not None
    return int(library.lanes())


@dataclass(frozen=True)
class LayerWeights:
    """One block: weights (out, in) with the norms' weights in them, tables (slots, 2, head_dim), mixes (dim,) or None.

    The tables turn queries and keys, which are normalised without a weight before.
    """

    qkv: Tensor
    out: Tensor
    up: Tensor
    down: Tensor
    cosines: Tensor
    sines: Tensor
    mixes: tuple[Tensor, Tensor] | None


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("qkv", "out", "up", "down", "cosines", "sines", "attention_mix", "ffn_mix")
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("layers", "dim", "heads", "hidden", "vocab", "is_brief")),
        ("layer", ctypes.POINTER(_Layer)),
        ("head", ctypes.c_void_p),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "chunks", "capacity", "length")),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("cache", _Cache),
        ("prompts", _Cache),
        *((name, ctypes.c_void_p) for name in ("owners", "last", "latest", "logits", "slots")),
        *((name, ctypes.c_int64) for name in ("batch", "count", "only_last", "threads")),
    ]


@dataclass
class NativeCache(KVCache):
    """A KVCache as the kernel reads it: keys (layers, B, H, chunks, lanes × D), so many positions a chunk; `last` is
    fp32.

    prompts: the cache that holds the first tokens, those of the prompt, where rows share them: row b continues its row
    owners[b], (B,) int64, and has keys and values of later tokens only. What has just been prefilled is shared by all
    rows that are selected from it.
    """

    prompts: NativeCache | None = None
    owners: Tensor | None = None

    _room = staticmethod(torch.empty)  # memory is only touched where it is filled
    _last_dtype = torch.float32

    @staticmethod
    def _keys_shape(layers: int, batch: int, heads: int, capacity: int, head_dim: int) -> tuple[int, ...]:
        return layers, batch, heads, -(-capacity // lanes()), lanes() * head_dim

    @property
    def capacity(self) -> int:
        """Most tokens it holds, those of the prompt included."""
        return self.shared_length + self.values.shape[3]

    @property
    def shared_length(self) -> int:
        """Tokens that `prompts` holds for it."""
        return 0 if self.prompts is None else self.prompts.prompt_length

    def select(self, rows: Tensor) -> Self:
        """See `KVCache.select`; what has just been prefilled isn't copied, but shared."""
        if self.prompts is not None:
            assert self.owners is not None
            chosen = super().select(rows)
            chosen.owners = self.owners[rows]
            return chosen
        if self.length != self.prompt_length:
            return super().select(rows)
        layers, _, heads, capacity, head_dim = self.values.shape
        kind, device = self.values.dtype, self.values.device
        chosen = self.allocate(layers, len(rows), heads, capacity - self.length, head_dim, dtype=kind, device=device)
        chosen.length = chosen.prompt_length = self.length
        chosen.last.copy_(self.last.index_select(2, rows))
        chosen.prompts, chosen.owners = self, rows.contiguous()
        return chosen

    def beside(self, other: KVCache) -> Self:
        """See `KVCache.beside`."""
        assert isinstance(other, NativeCache)
        if (self.prompts is None) != (other.prompts is None):
            raise ValueError("a cache that shares its prompts can't be one with a cache that doesn't")
        both = super().beside(other)
        if self.prompts is not None and other.prompts is not None:
            assert self.owners is not None and other.owners is not None
            both.prompts = self.prompts.beside(other.prompts)
            both.owners = torch.cat([self.owners, other.owners + self.prompts.values.shape[1]])
        return both

    def _emptied(self, batch: int) -> Self:
        cache = super()._emptied(batch)
        cache.prompts = self.prompts
        return cache

    def _filled(self) -> list[tuple[Tensor, int]]:
        own = self.length - self.shared_length
        keys, values = self.keys[:, :, :, : -(-own // lanes())], self.values[:, :, :, :own]
        return [(keys, 1), (values, 1), (self.last, 2), (self.ids, 0)]

    def described(self, length: int) -> _Cache:
        """Its own keys and values as the kernel takes them, of which so many tokens count."""
        _, batch, _, capacity, _ = self.values.shape
        return _Cache(
            keys=self.keys.data_ptr(),
            values=self.values.data_ptr(),
            batch=batch,
            chunks=self.keys.shape[3],
            capacity=capacity,
            length=length,
        )


def can_run(config: DALLEConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel is there, and made for such a model: squared ReLU, full attention, heads of whole vectors."""
    is_fit = config.ffn == "relu2" and set(config.layer_patterns) == {"full"}
    library = kernel() if device.type == "cpu" and is_fit else None
    if library is None or (config.dim // config.heads) % lanes():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(library.has_brief()))


class NativeTrunk:
    """All blocks, the last norm and the head, packed for the kernel; see `can_run`.

    dtype: of weights, keys and values. head: (vocab, dim) with the last norm's weight in it, computed in fp32.
    """

    def __init__(self, layers: Sequence[LayerWeights], head: Tensor, heads: int, dtype: torch.dtype) -> None:
        library = kernel()
        assert library is not None
        self._run = library.run_pass
        self._kept: list[Tensor] = []  # what the kernel's pointers point to
        self.vocab, self.dim = head.shape
        self._panels = self.dim // (2 * lanes())
        packed = (_Layer * len(layers))()
        for place, layer in zip(packed, layers, strict=True):
            for name in ("qkv", "out", "up", "down"):
                setattr(place, name, self._keep(pack(getattr(layer, name).to(dtype))))
            place.cosines, place.sines = self._keep(layer.cosines.float()), self._keep(layer.sines.float())
            if layer.mixes is not None:
                place.attention_mix, place.ffn_mix = (self._keep(mix.float()) for mix in layer.mixes)
        hidden = layers[0].up.shape[0]
        self._model = _Model(
            layers=len(layers),
            dim=self.dim,
            heads=heads,
            hidden=hidden,
            vocab=self.vocab,
            is_brief=dtype == torch.bfloat16,
            layer=packed,
            head=self._keep(pack(head.float())),
        )
        self._shifts = layers[0].mixes is not None

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def __call__(self, x: Tensor, slots: Tensor, cache: NativeCache, *, only_last: bool = False) -> Tensor:
        """Reads n tokens x (B, n, dim) in slots (n,) int64 behind those in the cache; fp32 logits (B, n, vocab).

        only_last: logits (B, 1, vocab) of the last token alone.
        """
        batch, count, dim = x.shape
        if dim != self.dim or len(slots) != count or batch != cache.values.shape[1]:
            raise ValueError(
                f"tokens {tuple(x.shape)} in {len(slots)} slots don't fit a cache of {cache.values.shape[1]} rows and "
                f"a model of {self.dim} numbers a token"
            )
        cache.check_room(count)
        x = x.float().contiguous()
        slots = slots.contiguous()
        logits = x.new_empty((batch, 1 if only_last else count, self.vocab))
        latest = None
        cache.latest.clear()
        if count > 1 and self._shifts:
            latest = x.new_empty((*cache.last.shape[:3], count + 1, self.dim))
            cache.latest.update({(i, j): latest[i, j] for i in range(len(latest)) for j in range(2)})
        prompts, owners = cache.prompts, cache.owners
        the_pass = _Pass(
            x=x.data_ptr(),
            cache=cache.described(cache.length - cache.shared_length),
            prompts=_Cache() if prompts is None else prompts.described(cache.shared_length),
            owners=None if owners is None else owners.data_ptr(),
            last=cache.last.data_ptr(),
            latest=None if latest is None else latest.data_ptr(),
            logits=logits.data_ptr(),
            slots=slots.data_ptr(),
            batch=batch,
            count=count,
            only_last=only_last,
            threads=min(torch.get_num_threads(), max(self._panels, batch * count)),  # more would only wait
        )
        self._run(ctypes.byref(self._model), ctypes.byref(the_pass))
        cache.advance(count)
        return logits


def pack(weight: Tensor) -> Tensor:
    """A weight (N, K) in panels of P = 2 × lanes output channels: (N / P, K, P), in bf16 (N / P, K / 2, P, 2)."""
    (channels, depth), panel = weight.shape, 2 * lanes()
    weight = F.pad(weight, (0, 0, 0, -channels % panel))
    if weight.dtype == torch.bfloat16:
        return weight.view(-1, panel, depth // 2, 2).transpose(1, 2).contiguous()
    return weight.view(-1, panel, depth).transpose(1, 2).contiguous()
