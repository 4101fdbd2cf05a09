"""A linear layer for decoding: its weight laid out once for oneDNN's matrix kernels, on CPUs that have them.

With a handful of rows most of a plain product's time goes into rearranging the weight. A packed one is up to twice as
fast, adds its bias-like operand or applies its ReLU on the way out, and gives each row the same bits however many
rows come with it, which a plain one in fp32 doesn't.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TYPICAL_ROWS = 64


class PackedLinear:
    """x (..., K) to x Wᵀ (..., N) for a weight (N, K) that never changes.

    is_packed: False asks for the plain product, which torch.compile, too, understands.
    """

    def __init__(self, weight: Tensor, *, is_packed: bool = True) -> None:
        self._weight: Any = weight
        self._packed: Any = None
        if is_packed and can_pack(weight.device, weight.dtype):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
            self._product, self._sum = _kernels()
            self._weight = None  # not kept twice

    def __call__(self, x: Tensor) -> Tensor:
        """x Wᵀ."""
        return self._run(x, "none")

    def relu(self, x: Tensor) -> Tensor:
        """max(x Wᵀ, 0)."""
        return self._run(x, "relu")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """x Wᵀ + other; other (..., N)."""
        if self._packed is None:
            return other + F.linear(x, self._weight)
        total: Tensor = self._sum(x, other, self._packed, None, "add")
        return total

    def _run(self, x: Tensor, then: str) -> Tensor:
        if self._packed is None:
            y = F.linear(x, self._weight)
            return F.relu(y) if then == "relu" else y
        product: Tensor = self._product(x, self._packed, None, then, [], "")
        return product


def _kernels() -> tuple[Any, Any]:
    """oneDNN's products of a packed weight: one alone, one that adds another operand."""
    overloads = torch.ops.mkldnn._linear_pointwise
    return overloads.default._op, overloads.binary._op  # past Python's dispatch, which takes as long as a small product


def can_pack(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build of PyTorch has the kernels for packed weights on a device, and the processor for such numbers.

    oneDNN takes bf16 with AVX-512 and later extensions only; a plain product takes it everywhere.
    """
    has_kernels = (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
    if not has_kernels or dtype == torch.float32:
        return has_kernels
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return dtype == torch.bfloat16 and is_supported is not None and bool(is_supported())
