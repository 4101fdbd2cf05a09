"""Gumbel noise that is a pure function of (seed, prompt, candidate, position): counter-based, so it needs no state.

SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") in integer torch operations: a
generator for each candidate and position, seeded by hashing. The noise of a token doesn't depend on the batch, on the
number of candidates or of processes, or on the device, and the global random generators are never touched.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from dalle_mini_impl.text import normalize_caption


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word."""
    return word - (1 << 64) if word >> 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_BITS = 23
"""Random bits of each uniform number: what float32 can hold besides the half that keeps it off 0 and 1."""


def noise_key(seed: int, prompt: str, purpose: str = "") -> int:
    """The 64-bit key, as an int64, of a prompt's noise; prompts that normalise alike have the same key.

    purpose: gives what is drawn beside the picture itself noise of its own.
    """
    suffix = f"\0{purpose}" if purpose else ""
    digest = hashlib.sha256(f"{seed}\0{normalize_caption(prompt)}{suffix}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def splitmix64(seeds: Tensor, numbers: Tensor) -> Tensor:
    """Word `number`, from 0, of the generator that each seed starts: int64, broadcast against each other."""
    z = seeds + (numbers + 1) * _GAMMA  # integers wrap around
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        z = z.bitwise_xor_(_shifted(z, shift)).mul_(multiplier)
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, shift: int) -> Tensor:
    """z >> shift as if z had no sign."""
    return (z >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def gumbel_noise(keys: Tensor, candidates: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise (n, L, vocab_size) float32 for positions (L,) or (n, L) int64 of n pictures.

    keys: (n,) int64 from `noise_key`. candidates: (n,) int64 candidate numbers, at least 0. Each 64-bit word makes
    two numbers: word i those of ids i and i + ⌈vocab_size / 2⌉.
    """
    seeds = splitmix64(splitmix64(keys, candidates)[:, None], positions)  # (n, L)
    half = -(-vocab_size // 2)
    words = splitmix64(seeds[..., None], torch.arange(half, device=keys.device))  # (n, L, V/2)
    uniform = torch.empty((*seeds.shape, 2 * half), device=keys.device)
    for part, shift in zip(uniform.chunk(2, dim=-1), (64 - _BITS, 64 - 2 * _BITS), strict=True):
        part.copy_((words >> shift).bitwise_and_((1 << _BITS) - 1))
    uniform.add_(0.5).mul_(2.0**-_BITS)  # in (0, 1), exact in float32
    return uniform.log_().neg_().log_().neg_()[..., :vocab_size]
