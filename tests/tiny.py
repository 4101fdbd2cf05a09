"""Tiny models with random weights for tests: built in milliseconds, every path of the real ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dalle_mini_impl.config import Recipe
from dalle_mini_impl.pretrained import (
    Bundle,
    build_clip,
    build_dalle,
    build_prior,
    build_vae,
    make_stream,
    save_bundle,
)
from dalle_mini_impl.prior import Prior
from dalle_mini_impl.stream import Stream
from dalle_mini_impl.text import TextTokenizer

TINY_VALUES = {
    "name": "tiny",
    "data": {"image_size": 16},
    "text": {"vocab_size": 300, "max_length": 16},
    "vae": {
        "downsample": 4,
        "patch": 2,
        "width": 8,
        "latent_width": 16,
        "encoder_blocks": 1,
        "decoder_blocks": 1,
        "codebook_size": 32,
        "code_dim": 4,
    },
    "clip": {"embed_dim": 16, "stem_width": 8, "width": 16, "heads": 2, "image_layers": 1, "text_layers": 1},
    "dalle": {"dim": 32, "layers": 2, "heads": 2},
    "prior": {"num_buckets": 8, "num_dot_buckets": 4, "dim": 24, "layers": 1, "heads": 3},
}
TINY_CAPTIONS = ["a red circle", "a blue square above a green triangle", "two small yellow stars"]
TIMED = {"time_sec", "tokens_per_sec", "pictures_per_sec", "data_wait_share"}
"""What the machine's speed decides in the lines of metrics.jsonl."""


def tiny_recipe(*overrides: str) -> Recipe:
    """A recipe of 16 px pictures, 4×4 tokens of 32 codes and 16 text slots."""
    return Recipe.parse(TINY_VALUES, overrides)


def some_captions(stream: Stream) -> Tensor:
    """A padded caption, a longer one, an empty and the null caption, (4, T) ids."""
    pieces: list[list[int]] = [[7, 9], [7, 8, 9, 10], []]
    return torch.tensor([*(stream.fit_caption(ids)[0] for ids in pieces), stream.null_caption().tolist()])


def randomize(model: nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    """Fills zero-initialised matrices and shakes the others, so that every weight matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            width = parameter.shape[-1] if parameter.ndim > 1 else 100
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale * width**-0.5)


def tiny_bundle(*overrides: str, seed: int = 0) -> Bundle:
    """A whole checkpoint with random weights, of unCLIP with a prior; the same for the same seed."""
    recipe = tiny_recipe(*overrides)
    tokenizer = TextTokenizer.train(TINY_CAPTIONS, recipe.text.vocab_size)
    stream = make_stream(recipe, tokenizer, recipe.text.max_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae, dalle, clip = build_vae(recipe), build_dalle(recipe, stream), build_clip(recipe, stream)
    for index, model in enumerate((vae, dalle, clip)):
        randomize(model, seed=3 * seed + index)
        model.eval()
    bundle = Bundle(recipe=recipe, tokenizer=tokenizer, stream=stream, vae=vae, dalle=dalle, clip=clip)
    return replace(bundle, prior=_tiny_prior(bundle, seed)) if recipe.dalle.image_prefix else bundle


def _tiny_prior(bundle: Bundle, seed: int) -> Prior:
    """A prior with random weights, fitted to random embeddings."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prior = build_prior(bundle.recipe, bundle.stream)
    randomize(prior, seed=100 + seed)
    vectors = torch.randn(200, bundle.recipe.clip.embed_dim, generator=generator)
    prior.fit(torch.nn.functional.normalize(vectors, dim=1), torch.linspace(-1, 1, 50))
    return prior.eval()


def tiny_checkpoint(folder: Path, *overrides: str, seed: int = 0) -> Path:
    """Saves a tiny bundle as a checkpoint folder."""
    return save_bundle(tiny_bundle(*overrides, seed=seed), folder)
