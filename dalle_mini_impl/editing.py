"""Editing by tokens: which cells of a picture are given, and which are to be drawn anew.

A decoder-only transformer reads the grid row by row: a cell that is drawn anew knows of all given cells before it, and
of none behind it.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_mini_impl.config import Fit
from dalle_mini_impl.decoding import FREE

_SHAPES_DIFFER = 0.02
"""Relative difference of two aspect ratios from which a mask wasn't painted over the picture."""


def keep_first(ids: Tensor, share: float) -> Tensor:
    """Gives the first `share` of a picture's ids (N,), row by row from the top; FREE for the rest, (N,) int64.

    Raises ValueError unless 0 ≤ share ≤ 1.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"the share to keep is {share:g}; it must be from 0 (nothing) to 1 (the whole picture)")
    known = ids.clone()
    known[round(share * len(ids)) :] = FREE
    return known


def mask_as_seen(mask: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    """A mask that was painted over a picture of some (width, height), made square as `to_square` makes the picture.

    What lies beyond the picture is dark. A mask of another shape than the picture's is for the square as it is.
    """
    width, height = size
    has_its_shape = abs(mask.width * height - mask.height * width) <= _SHAPES_DIFFER * mask.width * height
    if fit == "stretch" or not has_its_shape:
        return mask
    side = min(mask.size) if fit == "crop" else max(mask.size)
    left, top = (mask.width - side) // 2, (mask.height - side) // 2
    return mask.convert("L").crop((left, top, left + side, top + side))


def keep_outside(ids: Tensor, mask: Image.Image) -> Tensor:
    """Gives a picture's ids (N,) but where a mask is white: FREE in every cell with a bright pixel, (N,) int64.

    mask: of any size, laid over the whole square (see `mask_as_seen`). Raises ValueError where nothing in it is bright.
    """
    side = round(len(ids) ** 0.5)
    edge = -(-max(*mask.size, side) // side)  # pixels a cell, rounded up, so that no pixel of the mask is lost
    pixels = np.asarray(mask.convert("L").resize((side * edge, side * edge), Image.Resampling.NEAREST)) >= 128
    free = pixels.reshape(side, edge, side, edge).any(axis=(1, 3)).reshape(-1)
    if not free.any():
        raise ValueError("the mask is dark everywhere: paint white what is to be drawn anew")
    return torch.where(torch.from_numpy(free), FREE, ids)
