"""The codes around the cell that a token predicts, told to the token.

A cell's left neighbour is the token that predicts it; all others stand further back, and attention has to learn to find
them. Told of them, the transformer's layers are free for the caption sooner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dalle_mini_impl.config import NeighbourCell

OFFSETS: Mapping[NeighbourCell, tuple[int, int]] = {
    "above": (-1, 0),
    "above_left": (-1, -1),
    "above_right": (-1, 1),
    "two_left": (0, -2),
    "two_above": (-2, 0),
}
"""Rows and columns from the predicted cell to its neighbour: cells that come before it in row-major order."""


class Neighbours(nn.Module):
    """An embedding for each neighbour's code, and one for there being none; their sum is what a token is told."""

    def __init__(self, cells: Sequence[NeighbourCell], grid_size: int, num_codes: int, dim: int) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.table = nn.Embedding(len(cells) * (num_codes + 1), dim)  # a neighbour's codes after the other's
        self.register_buffer("places", _places(cells, grid_size), persistent=False)  # (N, K)
        self.register_buffer("first_rows", torch.arange(len(cells)) * (num_codes + 1), persistent=False)  # (K,)
        self.places: Tensor
        self.first_rows: Tensor

    def forward(self, ids: Tensor, start: int, end: int) -> Tensor:
        """What is told of the cells start … end - 1, (B, end - start, dim). ids: (B, n ≥ end - 1), of all before."""
        told: Tensor = self.table(self.rows(ids, start, end)).sum(dim=2)
        return told

    def rows(self, ids: Tensor, start: int, end: int) -> Tensor:
        """The same as rows of the table, (B, end - start, K) int64."""
        codes = nn.functional.pad(ids[:, : end - 1], (0, 1), value=self.num_codes)  # place -1 is the last: nothing
        return codes[:, self.places[start:end]] + self.first_rows

    def rows_at(self, ids: Tensor, cell: Tensor) -> Tensor:
        """Rows (B, K) for one cell (1,) int64 that only the device knows; ids (B, n) as long as they ever get."""
        places = self.places.index_select(0, cell)[0]  # (K,)
        codes = ids.index_select(1, places.clamp(min=0))
        return torch.where(places < 0, self.num_codes, codes) + self.first_rows


def _places(cells: Sequence[NeighbourCell], grid_size: int) -> Tensor:
    """Where the neighbours of each cell stand, (N, K) int64; -1 outside of the grid."""
    cell = torch.arange(grid_size * grid_size)
    columns = []
    for down, right in (OFFSETS[name] for name in cells):
        row, column = cell // grid_size + down, cell % grid_size + right
        is_inside = (row >= 0) & (column >= 0) & (column < grid_size)
        columns.append(torch.where(is_inside, row * grid_size + column, -1))
    return torch.stack(columns, dim=1)
