"""Batches of the benchmark: made captions and random image ids, by DALL·E's own task and prefetching."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator

import numpy as np
import torch

from dalle_mini_impl.bench.peers import Shape
from dalle_mini_impl.config import Recipe
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.data.shapes import ShapesSource
from dalle_mini_impl.data.token_cache import TokenCache
from dalle_mini_impl.pretrained import build_dalle, build_vae, make_stream
from dalle_mini_impl.text import TextTokenizer
from dalle_mini_impl.training.batches import Batch, BatchOrder, Prefetcher, to_device
from dalle_mini_impl.training.tasks.dalle import DALLETask

_NUM_PICTURES = 1000


def prefetched(shape: Shape, batch: int, device: torch.device) -> Generator[Batch, None, None]:
    """Endless batches on a device, each made while the one before is used; to be closed at the end.

    text: (B, T) int64, padded. ids: (B, N) int64. And all else that DALL·E's task gives.
    """
    prefetcher = Prefetcher(_maker(shape, batch), pin_memory=device.type == "cuda")
    try:
        for step in itertools.count():
            yield to_device(prefetcher.get(step), device)
    finally:
        prefetcher.close()


def _maker(shape: Shape, batch: int) -> Callable[[int], Batch]:
    """The batch of a step, as the training loop makes it."""
    source = ShapesSource(count=_NUM_PICTURES)
    captions = [source.scene(index)[1] for index in range(_NUM_PICTURES)]
    tokenizer = TextTokenizer.train([text for texts in captions for text in texts], shape.text_vocab)
    recipe = Recipe.parse(
        {
            "name": "bench",
            "data": {"image_size": 8 * shape.grid_size},
            "text": {"max_length": shape.text_length},
            "vae": {"downsample": 8, "codebook_size": shape.image_vocab},
        }
    )
    names, splits = [str(index) for index in range(_NUM_PICTURES)], ["train"] * _NUM_PICTURES
    no_pixels = np.zeros((_NUM_PICTURES, 0, 0, 3), dtype=np.uint8)
    data = PreparedData(no_pixels, names, captions, splits, {}, "made")  # type: ignore[arg-type]
    size = (1, _NUM_PICTURES, shape.num_image_tokens)
    ids = np.random.default_rng(0).integers(shape.image_vocab, size=size).astype(np.uint16)
    with torch.device("meta"):  # the task makes batches here and never asks its models
        dalle = build_dalle(recipe, make_stream(recipe, tokenizer, shape.text_length))
        vae = build_vae(recipe)
    task = DALLETask(dalle, data, recipe, tokenizer, TokenCache(ids, shape.image_vocab), vae)
    order = BatchOrder(task.num_items, batch, seed=0)

    def make(step: int) -> Batch:
        positions = task.positions(order, step, 0, 1)
        return task.batch(order.items(positions), positions)

    return make
