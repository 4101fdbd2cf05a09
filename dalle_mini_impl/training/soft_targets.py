"""Targets that are spread over codes like the true one, for the first half of DALL·E's training.

Which of two nearly equal codes a cell has is chance, and most of what a fresh transformer is told by its loss is about
such choices. Spread over codes like it, a target says first what a cell shows, and later which code exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_mini_impl.vae.model import DiscreteVAE

SPREAD = 0.05
"""How far targets reach: codes at a squared distance of 2 × SPREAD, where 1 is the mean squared length, get 1/e."""
ENDS_AT = 0.5
"""Share of the run after which targets are the codes alone."""


@torch.no_grad()
def code_likeness(vae: DiscreteVAE) -> Tensor:
    """How targets are spread over codes, (V, V) fp32: rows that add up to 1, by distances of what the decoder gets."""
    vectors = vae.code_vectors()
    squared = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist").square()
    unit = vectors.square().sum(dim=1).mean().clamp(min=1e-12)
    return (-squared / (2 * SPREAD * unit)).softmax(dim=1)


def soft_share(config_share: float, progress: float) -> float:
    """The share of the loss that is about spread targets: falls linearly from config_share to 0 at ENDS_AT."""
    return config_share * max(0.0, 1.0 - progress / ENDS_AT)
