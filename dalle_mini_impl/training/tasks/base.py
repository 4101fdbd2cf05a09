"""What the tasks of all stages have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dalle_mini_impl.config import Stage
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.text import TextTokenizer
from dalle_mini_impl.training.batches import Batch, BatchOrder, Indices
from dalle_mini_impl.training.task import StepContext


class BaseTask:
    """What the tasks have in common."""

    unit = "pictures"
    units_per_item = 1
    unlike_steps = 0
    data: PreparedData

    def names(self, items: Indices) -> list[str]:
        """Those of the training split."""
        return [self.data.names[index] for index in self.data.train[items]]

    def positions(self, order: BatchOrder, step: int, rank: int, world_size: int) -> Indices:
        """In the order's own order."""
        return order.positions(step, rank, world_size)

    def before_step(self, model: nn.Module, micro_batches: list[Batch], contexts: list[StepContext]) -> list[Batch]:
        """Nothing has to be known ahead."""
        return micro_batches

    def after_step(self, model: nn.Module, generator: torch.Generator) -> None:
        """Gradients taught it all."""

    def state_dict(self) -> dict[str, Any]:
        """The model has it all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is nothing to take over."""


def captioned(data: PreparedData, indices: Indices) -> Indices:
    """Those of the pictures that have a caption."""
    return np.array([index for index in indices if data.captions[index]], dtype=np.int64)


def check_captioned(stage: Stage, indices: Indices) -> None:
    """Raises ValueError where a stage that contrasts captions has fewer than two captioned pictures."""
    if len(indices) < 2:
        without = "dalle.image_prefix=0" if stage == "prior" else 'train.stages=["vae","dalle"]'
        raise ValueError(
            f"{stage} needs at least 2 captioned training pictures; the data has {len(indices)}: write x.txt beside "
            f"x.jpg, or choose another form (docs/data.md), or train without {stage}: --set '{without}'"
        )


def pick_caption(captions: Sequence[str], rng: np.random.Generator) -> str:
    """One of a picture's captions at random."""
    return captions[int(rng.integers(len(captions)))]


def encode(
    tokenizer: TextTokenizer, caption: str | None, text_length: int, dropout: float, rng: np.random.Generator
) -> Tensor:
    """Ids (T,) int64 of one caption, segmented with its own random numbers."""
    return tokenizer.batch([caption], text_length, dropout=dropout, rng=rng)[0][0]
