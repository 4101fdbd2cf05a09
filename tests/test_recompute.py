"""Gradient checkpointing keeps less and changes nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.config import Stage
from dalle_mini_impl.training.task import Task
from dalle_mini_impl.training.tasks.clip import CLIPTask
from dalle_mini_impl.training.tasks.prior import PriorTask
from dalle_mini_impl.training.tasks.vqgan import VQGANTask
from tests.test_distill import distill_task
from tests.test_prior import prior_task
from tests.test_training_tasks import batch_of, clip_task, dalle_task, gradients, reading_task, vae_task
from tests.test_upscale import upscale_task
from tests.test_vqgan import warmed_up
from tests.tiny import tiny_recipe

DEEP = (
    "dalle.layers=6 clip.image_layers=6 clip.text_layers=6 vae.encoder_blocks=3 vae.decoder_blocks=3 prior.layers=6 "
    "upscale.blocks=9 upscale.width=24"
).split()


def deep_dalle_with_dropout() -> Task:
    return dalle_task("dalle.dropout=0.2", *DEEP)


def kept_bytes(task: Task) -> int:
    """What autograd holds between the two passes, but for what it would hold anyway: weights and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in task.model.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gradients(task, batch_of(task), None)
    return sum(kept.values())


def captioning_task() -> CLIPTask:
    return clip_task("clip.caption_layers=2")


def prior_task_with_dropout() -> PriorTask:
    return prior_task("prior.dropout=0.2", "prior.layers=3")


def full_vqgan_task() -> VQGANTask:
    return warmed_up("vqgan.phase=full")


MAKERS: list[Callable[..., Any]] = [
    deep_dalle_with_dropout,
    reading_task,
    distill_task,
    clip_task,
    captioning_task,
    prior_task_with_dropout,
    vae_task,
    warmed_up,
    full_vqgan_task,
    upscale_task,
]


def test_every_stage_is_tried() -> None:
    assert {make().stage for make in MAKERS} == set(get_args(Stage))


@pytest.mark.parametrize("make", MAKERS)
def test_checkpointing_gradients_changes_neither_loss_nor_gradient(make: Callable[[], Any]) -> None:
    plain, again = make(), make()
    again.model.load_state_dict(plain.model.state_dict())
    again.model.checkpoint_blocks()
    for micro_batch_size in (None, 5):
        found = []
        for task in (plain, again):
            torch.manual_seed(3)
            found.append(gradients(task, batch_of(task), micro_batch_size))
        (expected, expected_gradients), (metrics, ours) = found
        assert metrics == expected
        assert ours.keys() == expected_gradients.keys()
        for name, gradient in ours.items():
            assert torch.equal(gradient, expected_gradients[name]), name


@pytest.mark.parametrize("make", [dalle_task, clip_task, prior_task, vae_task, upscale_task])
def test_checkpointing_gradients_keeps_less(make: Callable[..., Any]) -> None:
    """Autograd keeps the inside of a block; what goes into it, a tenth of that, is held by the checkpoint."""
    task = make(*DEEP)
    before = kept_bytes(task)
    task.model.checkpoint_blocks()
    assert kept_bytes(task) < 0.5 * before


def test_a_recipe_can_ask_for_it_and_does_not_by_default() -> None:
    assert not tiny_recipe().train.dalle.checkpoint_gradients
    assert tiny_recipe("train.dalle.checkpoint_gradients=true").train.dalle.checkpoint_gradients
