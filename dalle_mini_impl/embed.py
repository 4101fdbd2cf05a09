"""Texts and pictures to CLIP's space, some at a time: what ranking, classifying and searching begin with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle_mini_impl.clip import CLIP
from dalle_mini_impl.text import TextTokenizer


@torch.no_grad()
def encode_texts(clip: CLIP, tokenizer: TextTokenizer, texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """Unit vectors (n, E) fp32 of texts, on the CPU; ValueError for none."""
    if not texts:
        raise ValueError("there is no text to encode")
    ids, _ = tokenizer.batch(list(texts), clip.text_length)
    device = clip.logit_scale.device
    return torch.cat([clip.encode_text(part.to(device)).cpu() for part in torch.split(ids, batch_size)])


@torch.no_grad()
def encode_pictures(clip: CLIP, pictures: Tensor, batch_size: int = 64) -> Tensor:
    """Unit vectors (n, E) fp32 of pictures (n, 3, S, S) in [0, 1], on the CPU; ValueError for none."""
    if not len(pictures):
        raise ValueError("there is no picture to encode")
    device = clip.logit_scale.device
    return torch.cat([clip.encode_image(part.to(device)).cpu() for part in torch.split(pictures, batch_size)])
