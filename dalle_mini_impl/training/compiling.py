"""Whether a stage's blocks are worth compiling with torch.compile, and whether this machine can."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from dalle_mini_impl.config import StageConfig

logger = logging.getLogger("dalle_mini_impl.training")

LONG_ENOUGH_SEC = 300.0
LONG_ENOUGH_STEPS = 1500
"""Compiling takes about half a minute, 15 s more for each further length, and saves a seventh to a fifth of a step."""
MOST_LENGTHS = 6
_SETTLING_STEPS = 16


def should_compile(stage: str, config: StageConfig, model: nn.Module, allotted_sec: float | None) -> bool:
    """What `config.compile` means here; "auto" asks for a stage that is long enough and a compiler that works.

    It also asks for captions of few lengths, as each is compiled by itself, and for more time the more there are.
    Raises ValueError where compiling is asked for and the model has nothing that gains from it.
    """
    is_possible = hasattr(model, "compile_blocks")
    if config.compile != "auto":
        if config.compile and not is_possible:
            raise ValueError(f"train.{stage}.compile is true, but only dalle has blocks to compile: leave it at auto")
        return config.compile
    num_lengths: int = getattr(model, "num_lengths", 1)
    steps, seconds = LONG_ENOUGH_STEPS * num_lengths, LONG_ENOUGH_SEC * num_lengths
    is_long = config.steps >= steps if allotted_sec is None else allotted_sec >= seconds
    has_few_shapes = num_lengths <= (1 if stage == "distill" else MOST_LENGTHS)  # it runs captions by length
    return is_possible and has_few_shapes and is_long and can_compile(next(model.parameters()).device)


def settling_steps(model: nn.Module) -> int:
    """First steps of a compiled model in which captions of new lengths come up, and are compiled, one by one."""
    return _SETTLING_STEPS if getattr(model, "num_lengths", 1) > 1 else 0


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works on this machine; on a CPU it needs a C++ compiler, which many don't have."""

    def probe(x: Tensor) -> Tensor:
        return (x * x + 1).relu()

    try:
        torch.compile(probe)(torch.ones(8, device=device))
    except Exception as error:  # the compiler's own, which it doesn't promise to name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        logger.info("torch.compile doesn't work here, so steps take about a fifth longer (%s)", reason)
        return False
    return True
