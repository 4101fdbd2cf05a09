"""DiffAugment: pictures changed at random, differentiably, before the discriminator sees them (arXiv 2006.10738).

A discriminator learns a small set by heart within minutes. It can't where real and reconstructed pictures go through
the same changes, and the decoder doesn't learn to paint them, because its gradient goes through them as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle_mini_impl.config import Augmentation

NUM_DRAWS = 7
"""Random numbers that the changes of a picture take: 3 for colour, 2 for translation, 2 for the cut-out."""
TRANSLATION_SHARE = 1 / 8
CUTOUT_SHARE = 1 / 2


def diff_augment(images: Tensor, draws: Tensor, kinds: Sequence[Augmentation]) -> Tensor:
    """Changes pictures (B, 3, S, S), centred on 0, each by its own draws (B, NUM_DRAWS) in [0, 1).

    The result is a function of both: pictures with equal draws are changed alike.
    """
    if draws.shape != (len(images), NUM_DRAWS):
        raise ValueError(f"draws have shape {tuple(draws.shape)}; expected ({len(images)}, {NUM_DRAWS})")
    draws = draws.to(images.dtype)
    if "colour" in kinds:
        images = _colour(images, draws[:, :3])
    if "translation" in kinds:
        images = _translate(images, draws[:, 3:5])
    if "cutout" in kinds:
        images = _cut_out(images, draws[:, 5:7])
    return images


def _colour(images: Tensor, draws: Tensor) -> Tensor:
    """Brightness moved by up to a quarter of the range, saturation by a factor in [0, 2], contrast by one in [½, 1½].

    Pictures have a range of 1 here, while those of the paper have 2.
    """
    brightness, saturation, contrast = draws[:, :, None, None, None].unbind(dim=1)  # (B, 1, 1, 1) each
    images = images + (brightness - 0.5) / 2
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def _translate(images: Tensor, draws: Tensor) -> Tensor:
    """Moves by up to an eighth of the side each way; what comes in is grey."""
    size = images.shape[-1]
    limit = int(size * TRANSLATION_SHARE + 0.5)
    shift = (draws * (2 * limit + 1)).floor().long() - limit  # (B, 2)
    place = torch.arange(size, device=images.device)
    sources = place - shift[:, :, None]  # (B, 2, S): where each row and column comes from
    inside = ((sources >= 0) & (sources < size)).to(images.dtype)
    rows, columns = sources.clamp(0, size - 1).unbind(dim=1)
    moved = images.gather(2, rows[:, None, :, None].expand_as(images))
    moved = moved.gather(3, columns[:, None, None, :].expand_as(images))
    return moved * inside[:, 0, None, :, None] * inside[:, 1, None, None, :]


def _cut_out(images: Tensor, draws: Tensor) -> Tensor:
    """Makes a square of half the side grey, its centre anywhere in the picture."""
    size = images.shape[-1]
    half = int(size * CUTOUT_SHARE) / 2
    place = torch.arange(size, device=images.device) + 0.5
    is_cut = ((place - draws[:, :, None] * size).abs() < half).to(images.dtype)  # (B, 2, S)
    return images * (1 - is_cut[:, 0, None, :, None] * is_cut[:, 1, None, None, :])
