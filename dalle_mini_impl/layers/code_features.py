"""What is learned of one code is learned of codes like it, in training.

A row of its own for each code has to be learned from the cells that have this code, though hundreds of codes look
nearly alike. So in training each table of codes (what a code means where it is read, where it is a neighbour, and where
it is predicted) has a linear map of what the VAE's decoder is given for each code beside its rows. The sum is a table
like any other: checkpoints hold it, and nothing is drawn more slowly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dalle_mini_impl.precision import full_product

_SQUARED_LENGTH = 8.0
"""Mean squared length of a code's features: AdamW moves each weight of the map equally far, and rows that much further
than their own. It is that of 8 numbers of variance 1, for which rates were measured."""


def features_of(vectors: Tensor) -> Tensor:
    """Codes' vectors (V, C) as features, (V, C) fp32: their mean is 0, and their mean squared length is 8.

    Codes that are all one have features of zeros.
    """
    centred = vectors.float() - vectors.float().mean(dim=0)
    squared_length = centred.square().sum(dim=1).mean()
    return centred * (_SQUARED_LENGTH / squared_length.clamp(min=1e-12)).sqrt()


class CodeFeatures(nn.Module):
    """A parametrization that adds a map of the codes' features, of zeros at first, to a table (rows, dim).

    features: (V, C). tables: how many of V rows stand below each other, each with a map of its own. has_none: each of
    them has one more row, that for no code, which gets nothing.
    """

    def __init__(self, features: Tensor, dim: int, *, tables: int = 1, has_none: bool = False) -> None:
        super().__init__()
        self.tables, self.has_none = tables, has_none
        self.register_buffer("features", features, persistent=False)
        self.features: Tensor
        self.map = nn.Parameter(torch.zeros(tables * dim, features.shape[1], device=features.device))

    def forward(self, table: Tensor) -> Tensor:
        """(rows, dim) to (rows, dim)."""
        of_codes = full_product(self.features, self.map)  # (V, tables × dim)
        of_codes = rearrange(of_codes, "v (k d) -> k v d", k=self.tables)
        return table + F.pad(of_codes, (0, 0, 0, int(self.has_none))).flatten(0, 1)


def add_features(table: nn.Module, features: CodeFeatures) -> None:
    """Has a table's weight be its rows plus those of features from now on."""
    parametrize.register_parametrization(table, "weight", features)


def fold_features(model: nn.Module) -> None:
    """Makes rows plus features the own rows of each of a model's tables that has features."""
    for table in model.modules():
        if parametrize.is_parametrized(table, "weight"):
            parametrize.remove_parametrizations(table, "weight")
