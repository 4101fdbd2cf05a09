"""Attention of a training batch in compiled code (`attend.cpp`), forward and backward, as an operation of PyTorch's.

From the projection's output to what the next one takes: norms of queries and keys, rotation, causal scores, softmax
and mixing, head by head in the core's cache. `layers.attention.Attention` uses it where it can.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dalle_mini_impl.compiled import library

SOURCE = Path(__file__).with_name("attend.cpp")

LONGEST = 512
"""Tokens beyond which what belongs to one head leaves the core's cache."""
HEAD_DIMS = (32, 64, 96, 128)
"""What the kernel is compiled for."""


class _Attention(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "qkv",
                "query_weight",
                "key_weight",
                "cosines",
                "sines",
                "mixed",
                "log_sums",
                "mixed_gradient",
                "qkv_gradient",
                "query_weight_gradient",
                "key_weight_gradient",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "length", "heads", "head_dim", "is_causal", "is_brief", "threads")
        ),
    ]


def can_attend(qkv: Tensor, heads: int) -> bool:
    """Whether there is a kernel for the projection's output (B, L, 3 × heads × D), of its type."""
    batch, length, width = qkv.shape
    is_fit = batch > 0 and 0 < length <= LONGEST and width // (3 * heads) in HEAD_DIMS
    return is_fit and qkv.device.type == "cpu" and qkv.dtype in kernel_types()


def kernel() -> ctypes.CDLL | None:
    """The compiled attention, or None where it isn't wanted or can't be had; see `compiled.library`."""
    return library(SOURCE, "attention in training")


_kernel_types: tuple[torch.dtype, ...] | None = None


def kernel_types() -> tuple[torch.dtype, ...]:
    """What there is a kernel for: fp32, and bf16 where the processor multiplies it (AVX512-BF16); or nothing.

    Once asked, torch.compile sees a plain value here and doesn't ask the machine.
    """
    global _kernel_types
    if _kernel_types is None:
        attention = kernel()
        if attention is None:
            _kernel_types = ()
        else:
            _kernel_types = (torch.float32, torch.bfloat16) if attention.has_brief() else (torch.float32,)
    return _kernel_types


def attend(
    qkv: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    heads: int,
    is_causal: bool,
) -> Tensor:
    """Queries, keys and values (B, L, 3 × heads × D) to what attention mixes of them, (B, L, heads × D) in their type.

    query_weight, key_weight: (D,) of the norms. rope: cos and sin (L, D/2). Needs `can_attend`.
    """
    cos, sin = (None, None) if rope is None else (table.float() for table in rope)
    mixed: Tensor = _forward(qkv, query_weight.float(), key_weight.float(), cos, sin, heads, is_causal)[0]
    return mixed


@torch.library.custom_op("dalle_mini_impl::attend", mutates_args=(), device_types="cpu")
def _forward(
    qkv: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Mixed (B, L, heads × D) in qkv's type, and the logarithms of the softmax's sums, (B, heads, L) fp32."""
    batch, length, width = qkv.shape
    mixed = qkv.new_empty((batch, length, width // 3))
    log_sums = query_weight.new_empty((batch, heads, length))
    tensors = [qkv, query_weight, key_weight, cos, sin, mixed, log_sums, None, None, None, None]
    _run("attend_forward", tensors, qkv, heads, is_causal)
    return mixed, log_sums


@_forward.register_fake
def _(
    qkv: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    batch, length, width = qkv.shape
    return qkv.new_empty((batch, length, width // 3)), query_weight.new_empty((batch, heads, length))


@torch.library.custom_op("dalle_mini_impl::attend_backward", mutates_args=(), device_types="cpu")
def _backward(
    gradient: Tensor,
    qkv: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    log_sums: Tensor,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, in its type, and of both weights, from that of `mixed`."""
    gradients = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (qkv, query_weight, key_weight)]
    own = [qkv, query_weight, key_weight, cos, sin]
    tensors = [*own, None, log_sums, gradient.to(qkv.dtype), *gradients]
    _run("attend_backward", tensors, qkv, log_sums.shape[1], is_causal)
    return gradients[0], gradients[1], gradients[2]


@_backward.register_fake
def _(
    gradient: Tensor,
    qkv: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    log_sums: Tensor,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(qkv), torch.empty_like(query_weight), torch.empty_like(key_weight)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, _, ctx.is_causal = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, gradient, _):  # type: ignore[no-untyped-def]
    return *_backward(gradient, *ctx.saved_tensors, ctx.is_causal), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.dalle_mini_impl.attend)
def _forward_flops(qkv: torch.Size, *_: Any, **__: Any) -> int:
    """Two products of every token with every other, as PyTorch counts its own attention (see `flops`)."""
    batch, length, width = qkv
    return 4 * batch * length**2 * (width // 3)


@register_flop_formula(torch.ops.dalle_mini_impl.attend_backward)
def _backward_flops(_gradient: torch.Size, qkv: torch.Size, *_: Any, **__: Any) -> int:
    """Five such products: scores are computed again."""
    batch, length, width = qkv
    return 10 * batch * length**2 * (width // 3)


def _run(name: str, tensors: list[Tensor | None], qkv: Tensor, heads: int, is_causal: bool) -> None:
    """Calls the kernel with all tensors of `_Attention`, in its order; what it writes to is contiguous already."""
    attention = kernel()
    assert attention is not None
    batch, length, width = qkv.shape
    whole = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in whole]
    head_dim, is_brief = width // (3 * heads), qkv.dtype == torch.bfloat16
    sizes = batch, length, heads, head_dim, is_causal, is_brief, torch.get_num_threads()
    is_done = getattr(attention, name)(ctypes.byref(_Attention(*pointers, *sizes)))
    assert is_done, f"there is no kernel for heads of {head_dim} in {qkv.dtype}"
