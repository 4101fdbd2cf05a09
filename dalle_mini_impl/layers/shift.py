"""Token shift: each token also reads the one before it (RWKV, arXiv 2305.13048), and the one a row of the grid before.

"A red circle" needs "circle" to know of "red". Attention has to learn that first; a shift has it from the first step,
for a few additions. In a picture what stands above is as near as what stands to the left: the token a row before is the
one that predicted the cell above.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenShift(nn.Module):
    """Mixes each token with its predecessor, in a share that each channel learns: (1 - mix) x_t + mix x_(t-1).

    by_row: every second channel begins with half of that share for the token a row before; in all it is
    (1 - mix - row_mix) x_t + mix x_(t-1) + row_mix x_(t-row).
    """

    def __init__(self, dim: int, by_row: bool = False) -> None:
        super().__init__()
        mix = torch.linspace(0.0, 0.9, dim)
        row_mix = torch.where(torch.arange(dim) % 2 == 1, mix / 2, 0.0)
        self.mix = nn.Parameter(mix - row_mix if by_row else mix)
        self.row_mix = nn.Parameter(row_mix) if by_row else None

    def forward(self, x: Tensor, before: Tensor | None = None, above: Tensor | None = None) -> Tensor:
        """(B, L, dim) to (B, L, dim).

        before: (B, dim), the token ahead of the first one; default: zeros. above: (B, L, dim), the token a row before
        each, itself where there is none; default: none has one.
        """
        previous = F.pad(x[:, :-1], (0, 0, 1, 0)) if before is None else torch.cat([before[:, None], x[:, :-1]], dim=1)
        mixed = torch.lerp(x, previous, self.mix.to(x.dtype))
        if self.row_mix is None or above is None:
            return mixed
        return torch.addcmul(mixed, above - x, self.row_mix.to(x.dtype))


def row_before(x: Tensor, first: int, row: int) -> Tensor:
    """For each token of x (B, L, dim) the one that predicted the cell above, itself where there is none.

    first: the token that predicts the first cell of the grid. row: cells in a row of it.
    """
    reached = min(first + row, x.shape[1])  # the first token that has one
    return torch.cat([x[:, :reached], x[:, first : x.shape[1] - row]], dim=1) if reached < x.shape[1] else x
