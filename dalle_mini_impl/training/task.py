"""What the loop knows of a stage: the `Task`, what it is told at each step, and the precision it runs in."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalle_mini_impl.config import Stage
from dalle_mini_impl.out_of_memory import FittingChunks
from dalle_mini_impl.precision import computes_bf16
from dalle_mini_impl.training.batches import Batch, BatchOrder, Indices

EVALUATED_AT_ONCE = 64
"""Pictures that an evaluation works on at once, where memory allows."""


@dataclass(frozen=True)
class StepContext:
    """What a loss may depend on besides its batch.

    counts: the task's `counts` summed over the global batch. progress: share of the run that is done, in [0, 1].
    generator: this micro-batch's own random numbers, on the device. host: the micro-batch as it lies on the host, where
    a loss looks up what it decides by, such as which rows to take: there it doesn't wait for the device. step: the
    number of steps done before this one.
    """

    counts: Tensor
    progress: float
    generator: torch.Generator
    host: Batch
    step: int = 0


@dataclass(frozen=True)
class EvaluationContext:
    """Where and how an evaluation runs; every process takes part in it.

    folder: for pictures of samples, written by the main process. dtype: of the autocast, None for fp32. chunks: the
    pictures that are worked on at once; processes may take different numbers of them, so none waits for another there.
    """

    accelerator: Accelerator
    folder: Path
    step: int
    dtype: torch.dtype | None
    chunks: FittingChunks = field(default_factory=lambda: FittingChunks(EVALUATED_AT_ONCE))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision that the stage trains in."""
        return autocast(self.accelerator.device, self.dtype)


class Task(Protocol):
    """One stage's model, data, loss and evaluation."""

    stage: Stage
    model: nn.Module
    num_items: int
    unit: str
    units_per_item: int
    score: str
    """The metric of `evaluate` that picks the weights that are kept; lower is better where it starts with "-"."""
    unlike_steps: int
    """First steps that are so unlike the others that a budget must not be planned by their speed."""

    def positions(self, order: BatchOrder, step: int, rank: int, world_size: int) -> Indices:
        """The places in the stage's sequence of samples that one process takes in a step; a pure function."""

    def names(self, items: Indices) -> list[str]:
        """The names of the pictures of some items, as the data report has them."""

    def batch(self, items: Indices, positions: Indices) -> Batch:
        """The samples at some places of the stage's sequence of samples; called from a background thread."""

    def counts(self, batch: Batch) -> Tensor:
        """What the loss is a mean over, (C,) float64, additive over micro-batches and processes; batch: on the host."""

    def before_step(self, model: nn.Module, micro_batches: list[Batch], contexts: list[StepContext]) -> list[Batch]:
        """Whatever has to be known of a process's whole batch before its micro-batches are computed one by one."""

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the global batch's loss and metrics: they add up over all micro-batches.

        A loss without a graph leaves the model as it is in this step.
        """

    def after_step(self, model: nn.Module, generator: torch.Generator) -> None:
        """What is learned beside the loss's gradient, after each step that was taken (not after one that was skipped).

        generator: the step's own random numbers, the same on every process.
        """

    def evaluate(self, model: nn.Module, context: EvaluationContext) -> dict[str, float]:
        """Metrics on held-out pictures, the same on every process; may write pictures."""

    def describe(self, metrics: dict[str, float]) -> str:
        """Training metrics in a few words for the progress line."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed task needs besides its model, data and step."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with what `state_dict` gave."""


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bf16 where asked for, or where "auto" and the device computes it natively; None for fp32."""
    if precision == "auto":
        return torch.bfloat16 if computes_bf16(device) else None
    return torch.bfloat16 if precision == "bf16" else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to dtype on a device; nothing where dtype is None."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


class LossModule(nn.Module):
    """A task's loss as a module, so that DDP and FSDP see every use of the weights in its forward."""

    def __init__(self, task: Task, device: torch.device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model = task.model
        self._task = task
        self._device = device
        self._dtype = dtype

    def forward(self, *arguments: Any, ahead: bool = False) -> Any:
        """See `Task.loss`, or, with ahead, `Task.before_step`."""
        run = self._task.before_step if ahead else self._task.loss
        with autocast(self._device, self._dtype):
            return run(self.model, *arguments)
