"""The next tokens from logits in compiled code: guidance, filters, the draw and its log-likelihoods in one call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dalle_mini_impl.config import SamplingConfig
from dalle_mini_impl.native.kernel import kernel


class _Choice(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "conditional",
                "null",
                "noise",
                "scales",
                "ids",
                "likelihoods",
                "null_likelihoods",
            )
        ),
        *((name, ctypes.c_int64) for name in ("pictures", "tokens", "vocab", "noise_stride", "top_k", "threads")),
        *((name, ctypes.c_float) for name in ("temperature", "top_p", "min_p")),
    ]


def choose(
    conditional: Tensor, null: Tensor | None, scales: Tensor, settings: SamplingConfig, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `filters.choose` draws from guided logits, and its log-likelihoods with and without the caption.

    conditional, null, noise: (n, L, V) float32; without null nothing is guided. scales: (L,). Returns ids (n, L) int64
    and two times (n, L) float32, None for the second without null. Needs the kernel.
    """
    library = kernel()
    assert library is not None
    pictures, tokens, vocab = conditional.shape
    # The kernel takes what it is given for fp32, whatever PyTorch's default type was when that was made.
    conditional = conditional.float().contiguous()
    null = None if null is None else null.float().contiguous()
    scales, noise = scales.float().contiguous(), noise.float()
    if noise.stride(2) != 1 or (tokens > 1 and noise.stride(1) != vocab):
        noise = noise.contiguous()
    ids = conditional.new_empty((pictures, tokens), dtype=torch.long)
    likelihoods = conditional.new_empty((2, pictures, tokens))
    choice = _Choice(
        conditional=conditional.data_ptr(),
        null=None if null is None else null.data_ptr(),
        noise=noise.data_ptr(),
        scales=scales.data_ptr(),
        ids=ids.data_ptr(),
        likelihoods=likelihoods[0].data_ptr(),
        null_likelihoods=likelihoods[1].data_ptr(),
        pictures=pictures,
        tokens=tokens,
        vocab=vocab,
        noise_stride=noise.stride(0),
        top_k=settings.top_k,
        threads=torch.get_num_threads(),
        temperature=settings.temperature,
        top_p=settings.top_p,
        min_p=settings.min_p,
    )
    library.run_choice(ctypes.byref(choice))
    return ids, likelihoods[0], None if null is None else likelihoods[1]
