"""What happens to logits before a token is drawn: temperature, top-k, top-p, min-p and guidance, as pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle_mini_impl.config import SamplingConfig


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (..., V) with all but the k largest (and what equals the k-th) at -inf; 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits (..., V) with all at -inf but the likeliest ones whose probabilities add up to p (nucleus sampling)."""
    if p >= 1.0:
        return logits
    probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    likelier = probabilities.cumsum(dim=-1) - probabilities  # probability of what comes before: 0 for the first
    return logits.masked_fill((likelier >= p).scatter(-1, order, likelier >= p), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Logits (..., V) with all at -inf that are less than p times as likely as the likeliest (arXiv 2407.01082)."""
    if p == 0.0:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), -math.inf)


_TRIES = 4


def filter_logits(logits: Tensor, settings: SamplingConfig) -> Tensor:
    """Temperature, then top-k, top-p and min-p on logits (..., V); a temperature of 0 keeps the likeliest alone."""
    if settings.temperature == 0:
        return keep_top_k(logits, 1)
    kept = keep_top_p(keep_top_k(logits / settings.temperature, settings.top_k), settings.top_p)
    return keep_min_p(kept, settings.min_p)


def choose(logits: Tensor, settings: SamplingConfig, gumbel: Tensor | None) -> Tensor:
    """Draws ids (...) from logits (..., V): filters first, then the argmax with Gumbel noise (..., V) added."""
    if settings.temperature == 0 or gumbel is None:
        return logits.argmax(dim=-1)
    return (filter_logits(logits, settings) + gumbel).argmax(dim=-1)


def choose_without_sorting(logits: Tensor, settings: SamplingConfig, gumbel: Tensor | None) -> Tensor:
    """What `choose` draws, sooner: (..., V) to (...).

    Sorting for top-k or top-p costs more than all the rest. The filtered argmax is the first token, in the order of
    its noisy logit, that the filters keep: so take the argmax of all, ask whether what is likelier leaves room for it,
    and only where it doesn't, take the next; where none is found in a few tries, sort after all. The host waits for
    each answer, so it is for the CPU. Equally likely tokens at the edge of top-p are all kept, where a sort would have
    to pick.
    """
    if settings.temperature == 0 or gumbel is None or (settings.top_p >= 1.0 and settings.top_k == 0):
        return choose(logits, settings, gumbel)
    scaled = logits / settings.temperature
    if settings.top_p < 1.0:
        scaled = keep_top_k(scaled, settings.top_k)
        weights, limit = scaled.softmax(dim=-1), settings.top_p
    else:
        weights, limit = torch.ones_like(scaled), settings.top_k
    noisy = keep_min_p(scaled, settings.min_p) + gumbel
    for _ in range(_TRIES):
        drawn = noisy.argmax(dim=-1, keepdim=True)
        likelier = (weights * (scaled > scaled.gather(-1, drawn))).sum(dim=-1, keepdim=True)
        is_out = likelier >= limit
        if not is_out.any():
            return drawn[..., 0]
        noisy.scatter_(-1, drawn, torch.where(is_out, -math.inf, noisy.gather(-1, drawn)))
    drawn, rows = drawn[..., 0], is_out[..., 0]
    drawn[rows] = choose(logits[rows], settings, gumbel[rows])
    return drawn


def guidance_scales(settings: SamplingConfig, num_tokens: int) -> list[float]:
    """The guidance scale at each of num_tokens positions: constant, or rising from exactly 1 to `guidance`.

    linear rises evenly, cosine by (1 - cos(π x^power)) / 2 of the way at a share x of the grid: late where the power
    is above 1.
    """
    if settings.guidance_schedule == "constant":
        return [settings.guidance] * num_tokens
    shares = [index / (num_tokens - 1) if num_tokens > 1 else 1.0 for index in range(num_tokens)]
    if settings.guidance_schedule == "cosine":
        shares = [(1 - math.cos(math.pi * share**settings.guidance_power)) / 2 for share in shares]
    return [1.0 + (settings.guidance - 1.0) * share for share in shares]


def guide(conditional: Tensor, null: Tensor, scales: Tensor) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) of logits (n, L, V): null + scale × (conditional - null).

    scales: (L,); where it is 1 the result is exactly the conditional logits.
    """
    scales = scales[:, None]
    return torch.where(scales == 1.0, conditional, null + scales * (conditional - null))
