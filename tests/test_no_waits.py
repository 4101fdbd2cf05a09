"""No loss waits for its device: what it decides by, it looks up on the host.

The device here is PyTorch's meta device, which has shapes and no numbers, so that whoever reads one off it fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dalle_mini_impl.training import gradients as gradients_module
from dalle_mini_impl.training.batches import Batch, split_batch, to_device
from dalle_mini_impl.training.gradients import Gradients
from dalle_mini_impl.training.task import LossModule, StepContext, Task
from tests.test_distill import distill_task
from tests.test_prior import prior_task
from tests.test_training_tasks import (
    batch_of,
    clip_task,
    dalle_task,
    gradients,
    looking_task,
    reading_task,
    vae_task,
    vq_task,
)
from tests.test_upscale import upscale_task
from tests.test_vqgan import warmed_up

SLOTS = ("text.slot_step=4", "text.fit_length=false")
VIEWS = 'data.views=["plain", "flip", "up"]'
TASKS: dict[str, Callable[[], Any]] = {
    "vae, fsq": vae_task,
    "vae, vq": vq_task,
    "vae, vq without a codebook": lambda: vae_task("vae.quantizer=vq", "vae.quantize_after=1"),
    "vqgan": warmed_up,
    "clip": lambda: clip_task("clip.hard_negatives=1", "clip.caption_layers=1"),
    "clip, siglip": lambda: clip_task("clip.loss=siglip"),
    "dalle": lambda: dalle_task(VIEWS, "dalle.soft_targets=0.5", "dalle.dropout=0.1"),
    "dalle, slots": lambda: dalle_task(*SLOTS),
    "dalle, reading": reading_task,
    "dalle, looking ahead": looking_task,
    "distill": lambda: distill_task("dalle.reading_share=0.25", *SLOTS),
    "upscale": lambda: upscale_task(VIEWS),
    "prior": prior_task,
}
PROGRESS = 0.3


class _Copies(TorchFunctionMode):
    """Notes what would wait for the device while it copies from the host to it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or not out.is_meta:
            return out
        if func in (torch.tensor, torch.as_tensor, Tensor.to):
            is_there = isinstance(args[0], Tensor) and args[0].is_meta
            given = [] if is_there or kwargs.get("non_blocking") else [args[0]]
        elif func is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            given = [part for part in index if isinstance(part, Tensor) and not part.is_meta]
        else:
            given = []
        self.found += [f"{func.__name__}: {what}" for what in given]
        return out


def moved(task: Task, device: torch.device) -> Task:
    """A task with all of its models on a device."""
    for part in vars(task).values():
        for model in part if isinstance(part, tuple) else (part,):
            if isinstance(model, nn.Module):
                model.to(device)
    adversary = getattr(task, "adversary", None)
    if adversary is not None:
        adversary.discriminator.to(device)
        adversary.parameters = list(adversary.discriminator.parameters())
        adversary.anchors, adversary.ratio = adversary.anchors.to(device), adversary.ratio.to(device)
        adversary.begin()
    return task


def losses(task: Task, device: torch.device, micro_batch_size: int | None) -> Iterator[Tensor]:
    """The losses of a step's micro-batches, as the loop computes them."""
    hosts = list(split_batch(batch_of(task), micro_batch_size))
    counts = sum((task.counts(host) for host in hosts[1:]), start=task.counts(hosts[0])).to(device, non_blocking=True)
    generator = torch.Generator("cpu" if device.type == "meta" else device)
    contexts = [StepContext(counts, PROGRESS, generator, host, step=5) for host in hosts]
    parts = [to_device(host, device) for host in hosts]
    for part, context in zip(task.before_step(task.model, parts, contexts), contexts, strict=True):
        yield task.loss(task.model, part, context)[0]


@pytest.mark.parametrize("micro_batch_size", [None, 5])
@pytest.mark.parametrize("name", TASKS)
def test_a_loss_reads_nothing_off_its_device(
    name: str, micro_batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TASKS[name]()
    gradients(task, batch_of(task), micro_batch_size, PROGRESS)  # what is looked up only once is known from here on
    device = torch.device("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # there is none on that device
    moved(task, device)
    for loss in losses(task, device, micro_batch_size):
        assert loss.is_meta
    with _Copies() as copies:
        for loss in losses(task, device, micro_batch_size):
            assert loss.is_meta
    assert copies.found == []


class _OnDevice(Tensor):
    """Marks what was moved."""


def test_the_loop_counts_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def are_moved(batch: Batch) -> set[bool]:
        return {isinstance(tensor, _OnDevice) for tensor in batch.values()}

    def loss(_: Any, batch: Batch, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        assert are_moved(batch) == {True} and are_moved(context.host) == {False}
        assert all(torch.equal(batch[name], tensor) for name, tensor in context.host.items())
        sizes.append(len(batch["ids"]))
        return torch.zeros((), requires_grad=True), {}

    def move(batch: Batch, _: torch.device) -> Batch:
        return {name: tensor.clone().as_subclass(_OnDevice) for name, tensor in batch.items()}

    def count(batch: Batch) -> Tensor:
        assert are_moved(batch) == {False}
        return counts(batch)

    task, sizes = dalle_task(), list[int]()
    counts = task.counts
    monkeypatch.setattr(task, "counts", count)
    monkeypatch.setattr(task, "loss", loss)
    monkeypatch.setattr(gradients_module, "to_device", move)
    module = LossModule(task, torch.device("cpu"), None)
    added_up = Gradients(task, module, Accelerator(cpu=True), None, 5, lambda _: None)
    added_up.backward(batch_of(task), 0, 0.0, lambda *_: torch.Generator())
    added_up.fit(batch_of(task), lambda *_: torch.Generator())
    assert sizes == [5, 5, 2, 5]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: torch.bincount(x.long()),
    ],
)
def test_the_device_has_no_numbers(wait: Callable[[Tensor], Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        wait(torch.zeros(3, device="meta"))


def test_copies_that_wait_are_found() -> None:
    x, host = torch.zeros(3, device="meta"), torch.zeros(3)
    with _Copies() as copies:
        host.to("meta", non_blocking=True)
        x.to("meta")
        assert copies.found == []
        for wait in (lambda: host.to("meta"), lambda: torch.tensor(1, device="meta"), lambda: x[host.long()]):
            before = len(copies.found)
            wait()
            assert len(copies.found) == before + 1
