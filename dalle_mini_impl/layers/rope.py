"""Rotary positions (RoFormer, arXiv 2104.09864): 1-D for text, 2-D for the grid, in one table for the whole stream."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_mini_impl.stream import Stream


def axis_angles(positions: Tensor, num_frequencies: int, base: float = 1000.0) -> Tensor:
    """Angles of one axis, (L, num_frequencies) radians: position × base^(-i / num_frequencies)."""
    frequencies = base ** (-torch.arange(num_frequencies, dtype=torch.float32) / num_frequencies)
    return positions.float()[:, None] * frequencies


def stream_angles(stream: Stream, head_dim: int) -> Tensor:
    """Rotation angles of every slot of the stream, (T + N + P, head_dim / 2) radians.

    Half of the pairs turn with the row, half with the column. Text slot t of T stands at (t - T, t - T), on the
    diagonal that ends at the grid's corner, so that text is 1-D, never at angle 0, and the grid's angles don't
    depend on the text. A prefix stands on the same diagonal, ahead of the first text slot.
    """
    text = stream.text_positions() - stream.text_length  # (T,)
    grid = stream.image_positions()  # (N, 2)
    prefix = stream.prefix_positions() - stream.text_length  # (P,)
    rows = torch.cat([text, grid[:, 0], prefix])
    columns = torch.cat([text, grid[:, 1], prefix])
    return torch.cat([axis_angles(axis, head_dim // 4) for axis in (rows, columns)], dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (i, i + D/2) of x, (..., L, D), by the angles whose cos and sin are (L, D/2); norms are kept."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
