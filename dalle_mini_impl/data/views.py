"""Views of pictures: mirrored, or moved by a few pixels. A small set of pictures has many more of them.

A moved picture shows what its caption says as well as before, but other pixels share a token, so that nearly all of its
ids are others: what is learned by heart of one view doesn't help with the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dalle_mini_impl.config import View

MOVES: Mapping[View, tuple[int, int]] = {
    "up": (-1, 0),
    "down": (1, 0),
    "left": (0, -1),
    "right": (0, 1),
    "up_left": (-1, -1),
    "up_right": (-1, 1),
    "down_left": (1, -1),
    "down_right": (1, 1),
}
"""Views that are moved: which way down and right."""
_MOVED = 3 / 64  # of the side: no whole number of tokens for sides and tokens of usual sizes


def move_px(side: int) -> int:
    """How far a moved view of pictures of this side is moved, in pixels."""
    return max(1, round(_MOVED * side))


def has_moves(views: Sequence[View]) -> bool:
    """Whether any of the views is moved."""
    return any(view in MOVES for view in views)


def apply_view(images: Tensor, view: View, factor: int = 1) -> Tensor:
    """A view of pictures (B, 3, S, S): themselves, mirrored left to right, or moved with their borders repeated.

    factor: how many times the side of the pictures that the ids are of.
    """
    if view not in MOVES:
        return images.flip(-1) if view == "flip" else images
    side = images.shape[-1]
    pixels = factor * move_px(side // factor)
    shift = pixels * torch.tensor([MOVES[view]]).to(images.device, non_blocking=True)
    return shift_images(images, shift.expand(len(images), 2), pixels)


def shift_images(images: Tensor, shift: Tensor, limit: int) -> Tensor:
    """Moves each picture (B, 3, S, S) by its (down, right) pixels in shift (B, 2); borders are repeated."""
    if limit == 0:
        return images
    size = images.shape[-1]
    place = torch.arange(size, device=images.device)
    rows = (place - shift[:, :1]).clamp(0, size - 1)[:, None, :, None]  # (B, 1, S, 1)
    columns = (place - shift[:, 1:]).clamp(0, size - 1)[:, None, None, :]  # (B, 1, 1, S)
    batch = torch.arange(len(images), device=images.device)[:, None, None, None]
    channel = torch.arange(3, device=images.device)[:, None, None]
    return images[batch, channel, rows, columns]
