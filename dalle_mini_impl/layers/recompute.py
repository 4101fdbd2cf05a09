"""Gradient checkpointing: a block's inside is computed twice instead of being kept (arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Run = Callable[..., Tensor]


def recomputed(run: Run, wanted: bool) -> Run:
    """Where it is wanted and a gradient will be asked for, the same call keeping its arguments only; else the call.

    Dropout falls the same way both times, so that loss and gradient are those of the plain call.
    """
    if not (wanted and torch.is_grad_enabled()):
        return run
    return partial(checkpoint, run, use_reentrant=False)
