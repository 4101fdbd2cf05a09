"""Gradient checkpointing keeps less and changes nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.training.task import Task
from dalle_mini_impl.training.tasks.clip import CLIPTask
from tests.test_training_tasks import batch_of, clip_task, dalle_task, gradients, reading_task, vae_task
from tests.tiny import tiny_recipe

DEEP = ("dalle.layers=6", "clip.image_layers=6", "clip.text_layers=6", "vae.encoder_blocks=3", "vae.decoder_blocks=3")


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


@pytest.mark.parametrize("make", [deep_dalle_with_dropout, reading_task, clip_task, captioning_task, vae_task])
def test_checkpointing_gradients_changes_neither_loss_nor_gradient(make: Callable[[], Any]) -> None:
    plain, again = make(), make()
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


@pytest.mark.parametrize("make", [dalle_task, clip_task, vae_task])
def test_checkpointing_gradients_keeps_less(make: Callable[..., Any]) -> None:
    """Autograd keeps the inside of a block; what goes into it, a tenth of that, is held by the checkpoint."""
    task = make(*DEEP)
    before = kept_bytes(task)
    task.model.checkpoint_blocks()
    assert kept_bytes(task) < 0.5 * before


def test_a_recipe_can_ask_for_it_and_does_not_by_default() -> None:
    assert not tiny_recipe().train.dalle.checkpoint_gradients
    assert tiny_recipe("train.dalle.checkpoint_gradients=true").train.dalle.checkpoint_gradients
