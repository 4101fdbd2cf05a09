"""Which tokens a token may see: DALL·E 1's sparse patterns (arXiv 2102.12092, appendix B.1 and figure 11).

Masks are (queries, keys) bool, True where a key may be seen. In the picture a pattern is a set of distances: a cell
sees those so many cells before it in row-major order, 0 being itself. So rows and neighbourhoods wrap around at the
borders, as in the paper, whose row pattern reaches back to the cell above. All of them see the whole caption, and a
caption never sees the picture.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from dalle_mini_impl.config import AttentionPattern
from dalle_mini_impl.stream import Stream


def row_mask(size: int) -> Tensor:
    """(N, N): each cell of a size × size grid sees itself and the `size` cells before it, back to the one above it."""
    return _looking_back(size, range(size + 1))


def column_mask(size: int) -> Tensor:
    """(N, N): each cell sees itself and those above it in its column."""
    return _looking_back(size, range(0, size * size, size))


def conv_mask(size: int, kernel: int) -> Tensor:
    """(N, N): each cell sees those of the kernel × kernel neighbourhood around it that come no later than itself."""
    reach = kernel // 2
    return _looking_back(size, {row * size + column for row in range(reach + 1) for column in range(-reach, reach + 1)})


def full_mask(size: int) -> Tensor:
    """(N, N): each cell sees itself and all before it."""
    return _looking_back(size, range(size * size))


def _looking_back(size: int, distances: Collection[int]) -> Tensor:
    """(N, N): each cell sees those that come so many cells before it; negative and too long distances see nothing."""
    cells = torch.arange(size * size)
    is_seen = torch.zeros(size * size, dtype=torch.bool)
    is_seen[torch.tensor([distance for distance in distances if 0 <= distance < size * size])] = True
    distance = cells[:, None] - cells
    return is_seen[distance.clamp(min=0)] & (distance >= 0)


def stream_mask(stream: Stream, pattern: AttentionPattern, kernel: int) -> Tensor:
    """(T + N - 1, T + N - 1) of a pattern for all slots of a stream: text is causal, the picture sees all of it.

    Captions of t slots stand in the last t of the T text slots: their streams are the square from slot T - t on.
    """
    size, text = stream.grid_size, stream.text_length
    patterns = {"full": full_mask, "row": row_mask, "column": column_mask}
    cells = conv_mask(size, kernel) if pattern == "conv" else patterns[pattern](size)
    mask = torch.ones((text + len(cells), text + len(cells)), dtype=torch.bool).tril()
    mask[text:, text:] = cells
    return mask[:-1, :-1].contiguous()
