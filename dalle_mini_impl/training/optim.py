"""Optimisers, the learning rate as a pure function of the step, and gradient clipping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dalle_mini_impl.config import StageConfig
from dalle_mini_impl.layers.attention import Attention
from dalle_mini_impl.training.dtensors import local, rows_of, whole
from dalle_mini_impl.training.muon import Muon

MOST_FORGOTTEN = 0.1
"""Of a weight in a step at the peak rate, in runs of a few steps."""


def learning_rate_share(step: int, total: int | None, config: StageConfig) -> float:
    """The learning rate of a step as a share of its peak, in [final_lr_share, 1].

    Linear warm-up, flat, then linear decay over the last decay_share of `total` steps. A run too short for its
    warm-up warms up in a fifth of it. total: None while a budgeted stage still measures its speed (no decay yet).
    """
    warmup = config.warmup_steps if total is None else min(config.warmup_steps, total // 5)
    rising = (step + 1) / warmup if step < warmup else 1.0
    if total is None:
        return rising
    decay_steps = max(1.0, config.decay_share * total)
    left = min(1.0, max(0.0, (total - step) / decay_steps)) if config.decay_share > 0 else 1.0
    return min(rising, config.final_lr_share + (1 - config.final_lr_share) * left)


def build_optimizers(model: nn.Module, config: StageConfig) -> list[Optimizer]:
    """AdamW for all parameters, or Muon for `model.hidden_matrices()` and AdamW for the rest.

    Weight decay acts on matrices and convolutions only. Each group keeps its peak rate under "peak_lr".
    Raises ValueError where Muon is asked for and the model has no hidden matrices.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices: list[nn.Parameter] = []
    if config.optimizer == "muon":
        find = getattr(model, "hidden_matrices", None)
        matrices = [p for p in find() if p.requires_grad] if find is not None else []
        if not matrices:
            raise ValueError(f'{type(model).__name__} has no hidden matrices for Muon; set optimizer = "adamw"')
    taken = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
    optimizers: list[Optimizer] = [adamw]
    if matrices:
        rates = {"lr": config.muon_learning_rate, "weight_decay": config.weight_decay, "beta2": config.muon_beta2}
        stacked = _queries_keys_and_values(model) if config.muon_per_head else {}
        optimizers.append(Muon(_by_stacked(matrices, stacked), smallest=config.muon_smallest, **rates))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _queries_keys_and_values(model: nn.Module) -> dict[Tensor, int]:
    """The weights of each attention, and how many matrices they are: three a head."""
    return {module.qkv.weight: 3 * module.heads for module in model.modules() if isinstance(module, Attention)}


def _by_stacked(matrices: Sequence[nn.Parameter], stacked: Mapping[Tensor, int]) -> list[dict[str, Any]]:
    """Muon's groups of parameters, by how many matrices each of them is; 1 where nothing is said."""
    groups: dict[int, list[nn.Parameter]] = defaultdict(list)
    for parameter in matrices:
        groups[stacked.get(parameter, 1)].append(parameter)
    return [{"params": parameters, "stacked": count} for count, parameters in groups.items()]


def set_rates(optimizers: list[Optimizer], step: int, total: int | None, config: StageConfig) -> None:
    """Sets every group's learning rate, and Muon's weight decay, for a step; total as in `learning_rate_share`."""
    share = learning_rate_share(step, total, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
            if config.muon_timescale and isinstance(optimizer, Muon):
                group["weight_decay"] = timed_decay(group["peak_lr"], total, config.muon_timescale)


def timed_decay(peak_lr: float, total: int | None, timescale: float) -> float:
    """The weight decay that makes weights e times smaller in a share of `total` steps at the peak rate.

    Weights are an average over their latest updates, as long as that time. The best one is a share of the run, whatever
    its length (arXiv 2405.13698, of AdamW). total: None while a budgeted stage measures its speed (no decay yet).
    """
    return 0.0 if total is None else min(MOST_FORGOTTEN, 1 / (timescale * total)) / peak_lr


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scales the gradients down to a global norm of at most max_norm; returns the norm before, 0-d.

    Gradients are shared out over processes all together, or none is.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    rows = rows_of(gradients[0]) if gradients else None
    if rows is None:
        return whole(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, foreach=True))
    parts = [local(gradient) for gradient in gradients]
    squared = torch.nn.utils.get_total_norm(parts, foreach=True).square()
    torch.distributed.all_reduce(squared, group=rows)
    norm = squared.sqrt()
    torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
