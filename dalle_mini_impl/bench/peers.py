"""The peers beside whom the sampler is measured: transformers' `generate` and DALLE-pytorch, where installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Draw = Callable[[int], object]
"""Draws so many pictures, with guidance where the peer has any."""


@dataclass(frozen=True)
class Shape:
    """The one shape that all contestants have. Text and image ids are vocabularies of their own or share one."""

    dim: int = 256
    layers: int = 8
    heads: int = 4
    text_length: int = 32
    grid_size: int = 16
    text_vocab: int = 2048
    image_vocab: int = 1024

    @property
    def num_image_tokens(self) -> int:
        """Tokens of a picture."""
        return self.grid_size**2

    def __str__(self) -> str:
        return (
            f"d {self.dim}, {self.layers} layers, {self.heads} heads, {self.text_length} + {self.num_image_tokens} "
            f"tokens, {self.text_vocab} + {self.image_vocab} ids"
        )


def can_import(name: str) -> bool:
    """Whether a peer is installed and in working order: DALLE-pytorch needs packages that can be hard to find."""
    try:
        importlib.import_module(name)
    except Exception:  # whatever its own imports lead it to
        return False
    return True


def peers(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Draw]:
    """Every peer that can be imported, by name."""
    found: dict[str, Draw] = {}
    if can_import("transformers"):
        for family in ("gpt2", "llama"):
            for cache in ("dynamic", "static"):
                found[f"transformers {family}, {cache} cache"] = _transformers(shape, family, cache, device, dtype)
    if can_import("dalle_pytorch"):
        found["DALLE-pytorch"] = _dalle_pytorch(shape, device, dtype)
    return found


def _transformers(shape: Shape, family: str, cache: str, device: torch.device, dtype: torch.dtype) -> Draw:
    """`generate` of a GPT-2 or Llama of the same width, depth, vocabulary and length; two rows a picture.

    It has guidance of its own for one row only, so the null pass is stood for by a second row.
    """
    import transformers

    vocab, length = shape.text_vocab + shape.image_vocab, shape.text_length + shape.num_image_tokens
    config: Any
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocab, n_positions=length, n_embd=shape.dim, n_layer=shape.layers, n_head=shape.heads
        )
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=vocab,
            max_position_embeddings=length,
            hidden_size=shape.dim,
            intermediate_size=8 * shape.dim // 3,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
        )
        model = transformers.LlamaForCausalLM(config)
    model = model.to(device, dtype).eval()

    def draw(pictures: int) -> object:
        prompt = torch.randint(10, shape.text_vocab, (2 * pictures, shape.text_length), device=device)
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            top_k=100,
            min_new_tokens=shape.num_image_tokens,
            max_new_tokens=shape.num_image_tokens,
            pad_token_id=0,
            **({"cache_implementation": "static"} if cache == "static" else {}),
        )

    return draw


def build_dalle_pytorch(shape: Shape, device: torch.device) -> Any:
    """DALLE-pytorch's model of that shape with random weights."""
    import dalle_pytorch

    vae = dalle_pytorch.DiscreteVAE(
        image_size=8 * shape.grid_size, num_layers=3, num_tokens=shape.image_vocab, codebook_dim=64, hidden_dim=32
    )
    return dalle_pytorch.DALLE(
        dim=shape.dim,
        vae=vae,
        num_text_tokens=shape.text_vocab,
        text_seq_len=shape.text_length,
        depth=shape.layers,
        heads=shape.heads,
        dim_head=shape.dim // shape.heads,
    ).to(device)


def _dalle_pytorch(shape: Shape, device: torch.device, dtype: torch.dtype) -> Draw:
    """Its best path: with its cache, which only `cond_scale != 1` uses (its null pass then reads the wrong cache)."""
    model = build_dalle_pytorch(shape, device).eval()

    def draw(pictures: int) -> object:
        text = torch.randint(10, shape.text_vocab, (pictures, shape.text_length), device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model.generate_images(text, filter_thres=0.9, cond_scale=3.0, use_cache=True)

    return draw
