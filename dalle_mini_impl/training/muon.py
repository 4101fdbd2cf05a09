"""Muon: momentum whose update is orthogonalised, for matrices and convolutions (Keller Jordan et al. 2024).

PyTorch's own Muon takes matrices only and orthogonalises one after the other. This one also takes convolution
kernels, as (out, in × height × width) matrices, and orthogonalises all those of one shape in one batched product.
Of parameters that are shared out over processes (FSDP2) the momentum is shared out, too; directions are gathered whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dalle_mini_impl.precision import computes_bf16
from dalle_mini_impl.training.dtensors import local, part_like, whole_stack

Polynomial = tuple[float, float, float]
"""a, b and c of the odd quintic a x + b x³ + c x⁵."""

TOLERANCE = 0.3
"""How far from 1 singular values may end."""
ROUNDING = 1.02
"""How far above its range bf16 may carry a singular value; beyond it polynomials grow without bound."""
_EXCHANGES = 50
_LEAST = 1e-8  # keeps what has no gradient yet from being 0 / 0


def polar_polynomials(smallest: float) -> tuple[Polynomial, ...]:
    """The fewest quintics that, one after the other, bring all of [smallest, 1] to within TOLERANCE of 1.

    Each is the best for the range that the one before it leaves (Amsel et al. 2025, arXiv 2505.16932), where
    Newton-Schulz iterations take one polynomial for all steps and need more of them.
    smallest: 1e-6 to 0.5, else ValueError.
    """
    if not 1e-6 <= smallest <= 0.5:
        raise ValueError(f"smallest is {smallest}; quintics are computed for 1e-6 to 0.5")
    low, high, found = smallest, 1.0, list[Polynomial]()
    while not found or high > (1 + TOLERANCE) * ROUNDING:
        polynomial, error = _nearest_to_one(low, high)
        found.append(polynomial)
        low, high = 1 - error, (1 + error) * ROUNDING
    return tuple(found)


def _nearest_to_one(low: float, high: float) -> tuple[Polynomial, float]:
    """The odd quintic whose largest distance from 1 in [low, high] is smallest, and that distance.

    Remez' exchange: at four points, the ends and the two extrema between them, it is as far below 1 as above.
    """
    first, second = low + (high - low) / 4, low + (high - low) * 3 / 4
    for _ in range(_EXCHANGES):
        points = np.array([low, first, second, high])
        rows = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, error = np.linalg.solve(rows, np.ones(4)).tolist()
        first, second = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).real))
    return (a, b, c), error


def orthogonalize(matrices: Tensor, polynomials: Sequence[Polynomial]) -> Tensor:
    """The nearest semi-orthogonal matrices to (n, R, C), roughly: singular vectors stay, singular values end near 1.

    In bf16, or in fp32 where the device has no bf16 of its own. polynomials: see `polar_polynomials`.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices
    run = _iterate_in_bf16 if computes_bf16(matrices.device) else _iterate_on_the_gram_matrix
    result = run(wide, polynomials)
    return result.mT if tall else result


def _normalized(matrices: Tensor) -> Tensor:
    norms: Tensor = matrices.norm(dim=(1, 2), keepdim=True)
    return matrices / (ROUNDING * norms + 1e-7)


def _iterate_in_bf16(wide: Tensor, polynomials: Sequence[Polynomial]) -> Tensor:
    """X ← (a I + b X Xᵀ + c (X Xᵀ)²) X, of (n, R, C) with R ≤ C."""
    x = _normalized(wide.bfloat16())
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_on_the_gram_matrix(wide: Tensor, polynomials: Sequence[Polynomial]) -> Tensor:
    """The same in fp32: P = a I + b G + c G², G ← P G P, and the product of all P times X at the end.

    G = X Xᵀ is (n, R, R), so this takes half of the operations where C is 3 R, and less where it is more. It needs
    fp32: a singular value stands in G as its square, and the smallest squares are lost in bf16.
    """
    x = _normalized(wide.float())
    gram = x @ x.mT
    product: Tensor | None = None
    for step, (a, b, c) in enumerate(polynomials, start=1):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else polynomial @ product
        if step < len(polynomials):
            gram = polynomial @ gram @ polynomial
    return x if product is None else product @ x


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, scaled to the size of an AdamW step: 0.2 × sqrt(max(rows, columns)).

    With that scale (arXiv 2502.16982) its learning rates and weight decays are comparable to AdamW's.
    smallest: singular values of a direction from this share of its Frobenius norm on end near 1, smaller ones below;
    the smaller, the more iterations.
    beta2: above 0, the decay of a running mean of squares of each neuron's part of the direction, which brings all of
    them to one size and leaves the direction's norm as it is (NorMuon, arXiv 2510.05491). A neuron is a row, or a
    column where there are more of those.
    Groups of parameters may say how many matrices each parameter is, one above the other ("stacked", 1 by default):
    every one of them gets a direction of its own.
    Raises ValueError for a parameter with fewer than two dimensions, or whose rows are no multiple of "stacked".
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        beta2: float = 0.0,
        weight_decay: float = 0.0,
        smallest: float = 1.5e-3,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay, "stacked": 1}
        super().__init__(params, defaults)
        self.polynomials = polar_polynomials(smallest)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(
                        f"Muon takes matrices and kernels, not shape {tuple(parameter.shape)}: give it to AdamW"
                    )
                if parameter.shape[0] % group["stacked"]:
                    raise ValueError(
                        f"{parameter.shape[0]} rows can't be {group['stacked']} matrices one above the other: "
                        f'"stacked" has to divide them'
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape[0], parameter.shape[1:].numel()].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Updates all parameters of one shape."""
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        weights = [local(p) for p in parameters]
        buffers = [local(self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))) for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, buffers, group["momentum"])
        stack = whole_stack([direction.flatten(1) for direction in directions], parameters[0])
        single = stack.view(len(stack) * group["stacked"], -1, stack.shape[2])
        update = orthogonalize(single, self.polynomials).reshape(stack.shape)
        if group["beta2"]:
            update = self._evened_out(update, parameters, group["beta2"])
        scale = 0.2 * max(single.shape[1:]) ** 0.5
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        moves = [row.view(p.shape).to(p.dtype) for row, p in zip(update.contiguous(), parameters, strict=True)]
        own = [local(part_like(move, p)) for move, p in zip(moves, parameters, strict=True)]
        torch._foreach_add_(weights, own, alpha=-group["lr"] * scale)

    def _evened_out(self, update: Tensor, parameters: Sequence[nn.Parameter], beta2: float) -> Tensor:
        """Directions (n, R, C) whose neurons have moved about equally far of late; every process has all of each."""
        across = 2 if update.shape[1] >= update.shape[2] else 1
        lengths = torch.linalg.vector_norm(update, dim=across, keepdim=True, dtype=torch.float32)
        latest = lengths.square() / update.shape[across]  # (n, R, 1) or (n, 1, C)
        pairs = zip(parameters, latest, strict=True)
        squares = [self.state[p].setdefault("squares", torch.zeros_like(mean)) for p, mean in pairs]
        torch._foreach_lerp_(squares, list(latest), 1 - beta2)
        factors = 1 / (torch.stack(squares).sqrt() + _LEAST)
        before, after = (values.sum(dim=(1, 2), keepdim=True) for values in (latest, latest * factors.square()))
        evened: Tensor = update * (factors * (before / (after + _LEAST)).sqrt())
        return evened
