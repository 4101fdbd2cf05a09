"""Token shift: each token also reads the one before it (RWKV, arXiv 2305.13048).

"A red circle" needs "circle" to know of "red". Attention has to learn that first; a shift has it from the first step,
for a few additions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenShift(nn.Module):
    """Mixes each token with its predecessor, in a share that each channel learns: (1 - mix) x_t + mix x_(t-1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.linspace(0.0, 0.9, dim))

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """(B, L, dim) to (B, L, dim). before: (B, dim), the token ahead of the first one; default: zeros."""
        previous = F.pad(x[:, :-1], (0, 0, 1, 0)) if before is None else torch.cat([before[:, None], x[:, :-1]], dim=1)
        return torch.lerp(x, previous, self.mix.to(x.dtype))
