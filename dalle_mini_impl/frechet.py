"""The Fréchet distance between two sets of features, each taken for a Gaussian (FID, arXiv 1706.08500), in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """What a Gaussian is fitted by: it adds up over batches and processes.

    count: 0-d. total: (D,), the sum of the features. products: (D, D), the sum of their outer products. All fp64.
    """

    count: Tensor
    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The moments of features (n, D)."""
        if features.ndim != 2:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected (n, D)")
        rows = features.detach().double()
        return cls(rows.new_tensor(float(len(rows))), rows.sum(dim=0), rows.t() @ rows)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    @property
    def mean(self) -> Tensor:
        """(D,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D), unbiased. Raises ValueError for fewer than 2 features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, not {int(self.count)}")
        return (self.products - torch.outer(self.total, self.mean)) / (self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½), at least 0.

    The square root's trace is that of the symmetric (Σ₁^½ Σ₂ Σ₁^½)^½, so that no complex number arises where there are
    fewer pictures than dimensions. With few pictures the distance is too large, by how much depends on their number:
    compare distances of equal numbers only, and with the distance between two sets of real pictures.
    """
    if first.total.shape != second.total.shape:
        raise ValueError(f"features of {len(first.total)} and of {len(second.total)} dimensions can't be compared")
    root = _root(first.covariance)
    eigenvalues = torch.linalg.eigvalsh(root @ second.covariance @ root)
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    distance = (first.mean - second.mean).square().sum() + traces - 2 * cross
    return max(0.0, float(distance))


def _root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric matrix without negative eigenvalues."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.t()
    return root
