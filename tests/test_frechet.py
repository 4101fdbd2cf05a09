"""The Fréchet distance against its closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.frechet import Moments, frechet_distance


def _rows(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _exactly(rows: Tensor, mean: Tensor, root: Tensor) -> Tensor:
    """Rows with exactly this mean and the covariance root @ root.T."""
    centred = rows - rows.mean(dim=0)
    covariance = centred.t() @ centred / (len(rows) - 1)
    white = centred @ torch.linalg.inv(torch.linalg.cholesky(covariance)).t()
    return white @ root.t() + mean


def test_gaussians_of_diagonal_covariance_have_their_closed_form() -> None:
    deviations, others = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 0.1]).double()
    means = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([1.0, 1.0, 2.0]).double()
    first = Moments.of(_exactly(_rows(50, 3, 0), means[0], torch.diag(deviations)))
    second = Moments.of(_exactly(_rows(40, 3, 1), means[1], torch.diag(others)))
    expected = (means[0] - means[1]).square().sum() + (deviations - others).square().sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)


def test_gaussians_that_do_not_commute_match_the_general_square_root() -> None:
    roots = _rows(4, 4, 2), _rows(4, 4, 3)
    rows = [_exactly(_rows(60, 4, seed), torch.zeros(4).double(), root) for seed, root in enumerate(roots)]
    first, second = (root @ root.t() for root in roots)
    eigenvalues = torch.linalg.eigvals(first @ second)  # real and positive, though the product isn't symmetric
    expected = (first.trace() + second.trace() - 2 * eigenvalues.real.sqrt().sum()).item()
    assert frechet_distance(Moments.of(rows[0]), Moments.of(rows[1])) == pytest.approx(expected, rel=1e-9)


def test_it_is_zero_for_equal_sets_symmetric_and_grows() -> None:
    near, far = Moments.of(_rows(30, 5)), Moments.of(_rows(30, 5) + 0.5)
    assert frechet_distance(near, near) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(near, far) == pytest.approx(frechet_distance(far, near), rel=1e-9)
    assert frechet_distance(near, far) == pytest.approx(5 * 0.25, rel=1e-9)


def test_fewer_pictures_than_dimensions_still_give_a_number() -> None:
    first, second = Moments.of(_rows(4, 16)), Moments.of(_rows(4, 16, 1))
    assert math.isfinite(frechet_distance(first, second)) and frechet_distance(first, second) > 0
    with pytest.raises(ValueError, match="at least 2 pictures"):
        frechet_distance(Moments.of(_rows(1, 16)), second)
    with pytest.raises(ValueError, match="16 and of 8 dimensions"):
        frechet_distance(first, Moments.of(_rows(4, 8)))


def test_moments_add_up_over_batches() -> None:
    rows = _rows(20, 3)
    parts = Moments.of(rows[:7]) + Moments.of(rows[7:])
    assert torch.allclose(parts.covariance, torch.cov(rows.t()))
    assert torch.allclose(parts.mean, rows.mean(dim=0))
