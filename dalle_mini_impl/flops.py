"""Operations of a forward pass: those of its matrix products and convolutions, a multiply-add as two.

Attention counts by the usual convention, 4 T² D operations a head of D numbers and a sequence of T tokens: every token
with every other, though half of that is behind a causal mask and a kernel may leave it out.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")


def count_flops(forward: Callable[[], T]) -> tuple[float, T]:
    """Operations of a forward pass, and what it returns; the same on every device and with any kernel of attention."""
    unknown = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        result = forward()
    return float(counter.get_total_flops()), result


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Both products of queries (B, H, L, D), keys and values (B, H, M, D), which PyTorch doesn't count on CPUs."""
    return 2 * prod(query) * key[2] + 2 * prod(query[:3]) * prod(value[2:])


def hidden_flops(length: int, dim: int, layers: int) -> int:
    """Those that attention spends on what a causal mask hides, of a sequence of so many tokens."""
    return layers * 2 * dim * length * (length - 1)
