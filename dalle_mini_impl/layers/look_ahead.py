"""Looking ahead in training: each token also says what comes further on than the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_mini_impl.config import AheadCell
from dalle_mini_impl.layers.norm import Norm


class LookAhead(nn.Module):
    """Predicts cells beyond the next one from the same outputs (multi-token prediction, arXiv 2404.19737).

    The next cell mostly follows from its neighbours; what comes further on, from the caption. So captions are learned
    sooner. Each cell has a linear map of its own in front of the transformer's head, the identity at first. It takes
    part in training alone: no checkpoint holds it, and nothing is drawn by it.
    """

    def __init__(self, dim: int, grid_size: int, cells: Sequence[AheadCell]) -> None:
        super().__init__()
        self.offsets = {cell: {"right": 1, "below": grid_size}[cell] for cell in cells}
        self.maps = nn.ModuleDict({cell: nn.Linear(dim, dim, bias=False) for cell in self.offsets})
        self.norm = Norm(dim)
        for linear in self.maps.values():
            assert isinstance(linear, nn.Linear)
            nn.init.eye_(linear.weight)

    def forward(self, hidden: Tensor, head: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        """Summed negative log-likelihood in nats, 0-d, of the cells ahead of those that hidden (B, N, dim) predicts.

        ids: (B, N), those that hidden predicts. head: from (…, dim) to logits. The last cells have none ahead; each sum
        is scaled to as many as there are ids.
        """
        num_cells = ids.shape[1]
        total = torch.zeros((), device=hidden.device)
        for cell, offset in self.offsets.items():
            if offset < num_cells:
                logits = head(self.norm(self.maps[cell](hidden[:, : num_cells - offset])))
                nll = F.cross_entropy(logits.float().flatten(0, 1), ids[:, offset:].flatten(), reduction="sum")
                total = total + nll * (num_cells / (num_cells - offset))
        return total
