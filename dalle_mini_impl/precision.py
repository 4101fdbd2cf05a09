"""Which devices compute in bf16: one answer for training, drawing and the optimiser; and what stays in fp32 on all."""

from __future__ import annotations

import contextlib
import platform
from typing import Any

import torch
from torch import Tensor


def computes_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 natively, so that it is the faster type there.

    oneDNN takes bf16 on every CPU with AVX-512, if need be by converting to fp32 and back; that is slower than fp32 and
    doesn't count.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return is_supported is not None and bool(is_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Full precision inside of an autocast: for losses, their gradients, and what would not bear rounding.

    The meta device, on which estimates are made, has no autocast that could be turned off.
    """
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def full_product(rows: Tensor, others: Tensor) -> Tensor:
    """rows (…, K) times others (M, K) transposed, (…, M), in their own type inside of any autocast."""
    with autocast_off(rows.device):
        product: Tensor = rows @ others.t()
    return product
