"""Gumbel noise that is a pure function of (seed, prompt, candidate, position): counter-based, so it needs no state.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in integer torch operations. The
noise of a token doesn't depend on the batch, on the number of candidates or of processes, or on the device, and the
global random generators are never touched.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from dalle_mini_impl.text import normalize_caption

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def noise_key(seed: int, prompt: str) -> tuple[int, int]:
    """The two 32-bit key words of a prompt's noise; prompts that normalise alike have the same key."""
    digest = hashlib.sha256(f"{seed}\0{normalize_caption(prompt)}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Philox4x32-10: four pseudo-random 32-bit words for each counter and key.

    counter, key: int64 tensors of 32-bit words, broadcast against each other to (...). Returns (..., 4) int64.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 64 bits; the sign bit is just a bit here
        c0, c2 = ((product1 >> 32) & _WORD) ^ c1 ^ k0, ((product0 >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = product1 & _WORD, product0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return torch.stack([c0, c1, c2, c3], dim=-1)  # the rounds have broadcast all four


def gumbel_noise(keys: Tensor, candidates: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise (n, L, vocab_size) float32 for positions (L,) int64 of n pictures.

    keys: (n, 2) int64 from `noise_key`. candidates: (n,) int64 candidate numbers in [0, 2³²).
    """
    quads = torch.arange(-(-vocab_size // 4), device=keys.device)[None, None]  # (1, 1, V/4)
    counter = (quads, positions[None, :, None], candidates[:, None, None], torch.zeros_like(quads))
    words = philox(counter, (keys[:, 0, None, None], keys[:, 1, None, None]))  # (n, L, V/4, 4)
    uniform = ((words.flatten(2)[..., :vocab_size] >> 9) + 0.5) * 2.0**-23  # in (0, 1), exact in float32
    return uniform.log_().neg_().log_().neg_()
