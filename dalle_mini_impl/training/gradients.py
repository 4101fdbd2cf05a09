"""The gradient of a global batch, added up over micro-batches and processes, in parts that fit the memory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalle_mini_impl.config import Stage
from dalle_mini_impl.out_of_memory import explained, first_line, free_what_is_left, is_out_of_memory
from dalle_mini_impl.training.batches import Batch, split_batch, to_device
from dalle_mini_impl.training.sharding import is_sharded, no_sync
from dalle_mini_impl.training.task import StepContext, Task, autocast

logger = logging.getLogger("dalle_mini_impl.training")

Generators = Callable[..., torch.Generator]
"""Random numbers of a step; given numbers, those of a part of it."""


@contextlib.contextmanager
def within_memory(stage: Stage, doing: str) -> Iterator[None]:
    """For what can't be cut up: where memory runs out the error says in which stage, doing what, and what helps."""
    remedy = (
        f"free some memory, lower train.{stage}.micro_batch_size or set train.{stage}.checkpoint_gradients to true: "
        f"the same command with --resume goes on from what is saved; or begin another --out with a smaller model or "
        f"train.{stage}.batch_size"
    )
    with explained(f"{stage}: {doing}", remedy):
        yield


class Gradients:
    """Adds up a task's gradients; where memory runs out, over more and smaller micro-batches of the same batch.

    module: the task's loss, as Accelerate has prepared it. micro_batch_size: pictures a process computes at once to
    begin with. note: is told of a size to go on with where that takes a new start.
    """

    def __init__(
        self,
        task: Task,
        module: nn.Module,
        accelerator: Accelerator,
        dtype: torch.dtype | None,
        micro_batch_size: int,
        note: Callable[[int], None],
    ) -> None:
        self.task, self.module, self.accelerator, self.dtype = task, module, accelerator, dtype
        self.micro_batch_size = micro_batch_size
        self.limit: int | None = None
        """The size that memory has allowed where it has run out, None where it hasn't."""
        self.note = note

    def restrict(self, limit: int | None) -> None:
        """Takes over what memory has allowed before."""
        if limit is not None:
            self.limit, self.micro_batch_size = limit, min(limit, self.micro_batch_size)

    def backward(self, batch: Batch, step: int, progress: float, generators: Generators) -> dict[str, Tensor]:
        """Leaves the gradients of the global batch's loss in the weights; returns this process's part of the metrics.

        batch: this process's, on the host. step, progress: see `StepContext`.

        Several processes wait for each other, so that one can't go back to where the step began by itself: there
        running out of memory is a MemoryError, and a new start takes the smaller size. So it is for a single picture.
        """
        while True:
            try:
                return self._add_up(batch, step, progress, generators)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # Outside of the handler: an error keeps alive whatever the failed pass has made.
            size = self._halve(reason)
            if self.accelerator.num_processes > 1:
                self.note(self.micro_batch_size)
                raise MemoryError(
                    f"{self._too_much(size, reason)}; the same command with --resume goes on with "
                    f"{self.micro_batch_size} at a time"
                )
            self._warn(size, reason)

    def fit(self, batch: Batch, generators: Generators) -> None:
        """Finds the micro-batch that fits every process, before a step in which they wait for each other.

        Each goes through loss and gradient of a part of its batch by itself: in evaluation mode, in which tasks talk to
        no other process. Changes nothing but the size. batch: on the host.
        """
        before, reason, device = self.micro_batch_size, "in another process", self.accelerator.device
        self.task.model.eval()
        counts = self.task.counts(batch).to(device)
        while True:
            part = next(split_batch(batch, self.micro_batch_size))
            context = StepContext(counts, 0.0, generators(), part, step=self.task.unlike_steps)
            try:
                with autocast(device, self.dtype):
                    loss, _ = self.task.loss(self.task.model, to_device(part, device), context)
                loss.backward()  # type: ignore[no-untyped-call]
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            self._halve(reason)
        self.module.zero_grad(set_to_none=True)
        fitting = torch.tensor([self.micro_batch_size], device=device)
        smallest = int(self.accelerator.gather(fitting).min())
        if smallest < before:
            self.restrict(smallest)
            self._warn(before, reason)

    def _add_up(self, batch: Batch, step: int, progress: float, generators: Generators) -> dict[str, Tensor]:
        accelerator, world = self.accelerator, self.accelerator.num_processes
        device, rank = accelerator.device, accelerator.process_index
        counts = accelerator.reduce(self.task.counts(batch).to(device, non_blocking=True), "sum")
        parts_on_host = list(split_batch(batch, self.micro_batch_size))
        micro_batches = [to_device(part, device) for part in parts_on_host]
        contexts = [
            StepContext(counts, progress, generators(rank, index), part, step)
            for index, part in enumerate(parts_on_host)
        ]
        if is_sharded(self.module):
            micro_batches = self.module(micro_batches, contexts, ahead=True)
        else:  # a forward of DDP's would wait for its backward
            with autocast(device, self.dtype):
                micro_batches = self.task.before_step(self.task.model, micro_batches, contexts)
        metrics: dict[str, Tensor] = {}
        for micro_batch, context in zip(micro_batches, contexts, strict=True):
            torch.manual_seed(context.generator.initial_seed())  # dropout has no other source of randomness
            last = context is contexts[-1]
            with contextlib.nullcontext() if last else no_sync(self.module, accelerator):
                loss, parts = self.module(micro_batch, context)
                if loss.requires_grad:
                    (loss * world).backward()  # DDP averages over processes what has to be summed
            for name, value in {"loss": loss, **parts}.items():
                metrics[name] = metrics[name] + value.detach() if name in metrics else value.detach()
        return metrics

    def _halve(self, reason: str) -> int:
        """Drops what the failed pass has left and halves the size; returns what it was."""
        self.module.zero_grad(set_to_none=True)
        free_what_is_left()
        size, stage = self.micro_batch_size, self.task.stage
        if size == 1:
            raise MemoryError(
                f"{self._too_much(1, reason)}; set train.{stage}.checkpoint_gradients to true, take a smaller model, "
                f"or free some memory"
            )
        self.restrict(size // 2)
        return size

    def _too_much(self, size: int, reason: str) -> str:
        pictures = "one picture at a time is" if size == 1 else f"{size} pictures at a time are"
        return f"{self.task.stage}: {pictures} too much for the memory ({reason})"

    def _warn(self, size: int, reason: str) -> None:
        text = self._too_much(size, reason)
        logger.warning("%s; goes on with %d at a time, the batch stays the same", text, self.micro_batch_size)
