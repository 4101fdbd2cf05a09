"""Faults of Muon forbidden here: updates of another size than PyTorch's own, shapes that mix, kernels cut wrongly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_mini_impl.training import muon as muon_module
from dalle_mini_impl.training.muon import ROUNDING, Muon, Polynomial, orthogonalize, polar_polynomials

POLYNOMIALS = polar_polynomials(1.5e-3)
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
"""Keller Jordan's, which PyTorch's Muon takes."""


def _parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def _gradients(parameters: list[nn.Parameter], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator) for p in parameters]


@pytest.fixture(params=["bf16", "fp32"])
def number_type(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of iterating, whatever the device would take."""
    monkeypatch.setattr(muon_module, "computes_bf16", lambda device: request.param == "bf16")
    return str(request.param)


@pytest.mark.parametrize("shape", [(8, 8), (5, 20), (20, 5), (1, 6)])
def test_singular_values_end_near_one_and_singular_vectors_stay(shape: tuple[int, int], number_type: str) -> None:
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    out = orthogonalize(torch.stack([matrix, 1000 * matrix]), polar_polynomials(1e-2)).float()
    assert torch.allclose(out[0], out[1], atol=0.05)  # the size of a gradient doesn't count
    aligned = (u.t() @ out[0] @ v.t()).diagonal()
    assert aligned.min() > 0.3 and aligned.max() < 1.4


def _applied(polynomials: Sequence[Polynomial], values: Tensor) -> Tensor:
    for a, b, c in polynomials:
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize("smallest", [1e-6, 1.5e-3, 1e-2, 0.5])
def test_polynomials_swing_evenly_about_one(smallest: float) -> None:
    """What no other odd quintic could do better: each leaves values as far below 1 as above, and ever nearer."""
    values = torch.logspace(math.log10(smallest), 0, 200_001, dtype=torch.float64)
    distances = [1.0]
    for polynomial in polar_polynomials(smallest):
        values = _applied([polynomial], values)
        assert (values.max() - 1).item() == pytest.approx((1 - values.min()).item(), rel=1e-2)
        distances.append((values.max() - 1).item())
    assert distances == sorted(distances, reverse=True) and distances[-1] < 0.3 < distances[-2]


@pytest.mark.parametrize(("smallest", "iterations"), [(1e-6, 10), (1.5e-3, 5), (3e-3, 4), (1e-2, 3), (0.5, 1)])
def test_the_smaller_what_is_lifted_the_more_iterations(smallest: float, iterations: int) -> None:
    assert len(polar_polynomials(smallest)) == iterations


def test_three_polynomials_end_as_near_to_one_as_five_newton_schulz_steps() -> None:
    values = torch.logspace(-2, 0, 10_000, dtype=torch.float64)
    ours, theirs = (_applied(polynomials, values) - 1 for polynomials in (polar_polynomials(1e-2), NEWTON_SCHULZ))
    assert ours.abs().max() < theirs.abs().max() < 0.33


@pytest.mark.parametrize("smallest", [0.0, 1e-7, 0.6, math.nan])
def test_what_no_quintics_are_computed_for_is_refused(smallest: float) -> None:
    with pytest.raises(ValueError, match=f"smallest is {smallest}; quintics are computed for 1e-6 to 0.5"):
        polar_polynomials(smallest)


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_iterating_on_the_gram_matrix_changes_nothing(
    shape: tuple[int, int], smallest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon_module, "computes_bf16", lambda device: False)
    u, s, v = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    matrices = u * torch.logspace(0, math.log10(smallest), s.shape[1]) @ v
    expected = matrices.double() / matrices.double().norm(dim=(1, 2), keepdim=True) / ROUNDING
    for a, b, c in POLYNOMIALS:
        gram = expected @ expected.mT
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    out = orthogonalize(matrices, POLYNOMIALS).double()
    assert (out - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 3.0, 1e3])
def test_a_single_direction_stays_one(scale: float, number_type: str) -> None:
    """Its singular value is the whole norm: rounded upwards, it must not leave the range that polynomials are for."""
    left, right = F.normalize(torch.randn(50, 24), dim=1), F.normalize(torch.randn(50, 40), dim=1)
    out = orthogonalize(scale * left[:, :, None] * right[:, None, :], polar_polynomials(1e-2)).float()
    assert torch.einsum("nr,nrc,nc->n", left, out, right).sub(1).abs().max() < 0.33


def test_a_zero_gradient_moves_nothing(number_type: str) -> None:
    assert not orthogonalize(torch.zeros(1, 4, 6), POLYNOMIALS).any()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_matrices_move_as_with_pytorch_s_own(
    weight_decay: float, number_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon_module, "ROUNDING", 1.0)  # PyTorch leaves no room above the norm
    shapes = [(6, 18), (18, 6), (6, 18), (8, 8)]
    ours, theirs = _parameters(*shapes), _parameters(*shapes)
    muon = Muon(ours, lr=0.02, momentum=0.9, weight_decay=weight_decay)
    reference = torch.optim.Muon(
        theirs, lr=0.02, momentum=0.9, weight_decay=weight_decay, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    muon.polynomials = NEWTON_SCHULZ
    start = [p.detach().clone() for p in ours]
    for step in range(5):
        for group in (ours, theirs):
            for parameter, gradient in zip(group, _gradients(group, step), strict=True):
                parameter.grad = gradient
        muon.step()
        reference.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        assert (mine - other).norm() < 0.03 * (other - before).norm()  # PyTorch's iterates in bf16


def test_kernels_move_as_their_matrices() -> None:
    weight, gradient = torch.randn(2, 6, 4, 3, 3)
    matrix = nn.Parameter(weight.flatten(1).clone())
    matrix.grad = gradient.flatten(1)
    Muon([matrix], lr=0.1).step()
    for layout in (torch.contiguous_format, torch.channels_last):
        kernel = nn.Parameter(weight.contiguous(memory_format=layout).clone())
        kernel.grad = gradient.contiguous(memory_format=layout)
        Muon([kernel], lr=0.1).step()
        assert torch.allclose(kernel.flatten(1), matrix, atol=1e-6)


def test_one_shape_in_a_batch_equals_one_by_one() -> None:
    together, alone = _parameters((6, 9), (6, 9), (6, 9)), _parameters((6, 9), (6, 9), (6, 9))
    muons = [Muon(together, lr=0.1), *(Muon([p], lr=0.1) for p in alone)]
    for group in (together, alone):
        for parameter, gradient in zip(group, _gradients(group, 0), strict=True):
            parameter.grad = gradient
    for muon in muons:
        muon.step()
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_stacked_matrices_move_as_if_each_were_alone(weight_decay: float, number_type: str) -> None:
    """A matrix with large gradients, as values beside queries have, takes nothing from the others."""
    stacked = _parameters((15, 8), (15, 8))
    alone = [[nn.Parameter(part.clone()) for part in p.detach().chunk(3)] for p in stacked]
    muons = [Muon([{"params": stacked, "stacked": 3}], lr=0.1, weight_decay=weight_decay)]
    muons += [Muon(parts, lr=0.1, weight_decay=weight_decay) for parts in alone]
    for step in range(3):
        for parameter, gradient, parts in zip(stacked, _gradients(stacked, step), alone, strict=True):
            parameter.grad = gradient * torch.tensor([1.0, 100.0, 0.01]).repeat_interleave(5)[:, None]
            for part, own in zip(parts, parameter.grad.chunk(3), strict=True):
                part.grad = own
        for muon in muons:
            muon.step()
    for parameter, parts in zip(stacked, alone, strict=True):
        assert torch.allclose(parameter, torch.cat(parts), atol=1e-3)


@pytest.mark.parametrize("shape", [(12, 4), (4, 12)])
@pytest.mark.parametrize("beta2", [0.0, 0.9])
def test_beta2_lets_all_neurons_move_equally_far(shape: tuple[int, int], beta2: float, number_type: str) -> None:
    parameter, plain = _parameters(shape, shape)
    longer = 0 if shape[0] > shape[1] else 1
    loud = torch.logspace(0, 1, 12).unsqueeze(1 - longer)
    muons = [Muon([parameter], lr=0.1, beta2=beta2), Muon([plain], lr=0.1)]
    far = torch.zeros(12)
    for step in range(60):
        before, plain_before = parameter.detach().clone(), plain.detach().clone()
        parameter.grad = plain.grad = _gradients([parameter], step)[0] * loud
        for muon in muons:
            muon.step()
        move = parameter.detach() - before
        assert move.norm().item() == pytest.approx((plain.detach() - plain_before).norm().item(), rel=1e-2)
        far += move.square().sum(dim=1 - longer)
    spread = (far.max() / far.min()).sqrt().item()
    assert spread < 1.3 if beta2 else spread > 3


def test_beta2_leaves_what_has_no_gradient_yet(number_type: str) -> None:
    """A matrix behind one of zeros gets its first gradient a step later."""
    [parameter] = _parameters((6, 4))
    before, muon = parameter.detach().clone(), Muon([parameter], lr=0.1, beta2=0.95)
    parameter.grad = torch.zeros(6, 4)
    muon.step()
    assert torch.equal(parameter, before)
    parameter.grad = torch.randn(6, 4)
    muon.step()
    assert parameter.isfinite().all() and not torch.equal(parameter, before)


def test_rows_that_are_no_such_stack_are_refused() -> None:
    with pytest.raises(ValueError, match="16 rows can't be 3 matrices one above the other"):
        Muon([{"params": _parameters((16, 8)), "stacked": 3}], lr=0.1)


def test_what_has_no_gradient_stays_and_vectors_are_refused() -> None:
    used, unused = _parameters((4, 4), (4, 4))
    used.grad = torch.randn(4, 4)
    before = unused.detach().clone()
    Muon([used, unused], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(unused, before)
    with pytest.raises(ValueError, match=r"not shape \(4,\): give it to AdamW"):
        Muon(_parameters((4,)), lr=0.1)
