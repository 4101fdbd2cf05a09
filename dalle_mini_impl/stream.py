"""The token stream ``[text ids … | image ids …]``: its lengths, its grid, its positions, what may stand in each slot.

This is the only file that knows offsets. Text and image ids live in separate vocabularies, so an id is never shifted.

With T text slots and N image slots (a row-major square grid) the transformer reads T + N - 1 tokens: all text and
all image tokens but the last. The output at text slot t predicts text id t + 1; the output at the last text slot
predicts the first image id; the output at image slot i predicts image id i + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PAD, BOS, EOS, UNK, NULL = 0, 1, 2, 3, 4
"""Special text ids, the same in every tokenizer: padding, begin, end, unknown (never used), null caption."""
NUM_SPECIAL = 5


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The shape of one model's token stream.

    text_length: T, slots of the caption with its begin and end.
    grid_size: side of the square grid of image tokens; N = grid_size².
    text_vocab, image_vocab: sizes of the two vocabularies.
    """

    text_length: int
    grid_size: int
    text_vocab: int
    image_vocab: int

    def __post_init__(self) -> None:
        if self.text_length < 2 or self.grid_size < 1:
            raise ValueError(
                f"a stream needs 2 text slots and a grid of 1, not {self.text_length} and {self.grid_size}"
            )
        if self.text_vocab <= NUM_SPECIAL or self.image_vocab < 2:
            raise ValueError(
                f"a stream needs more than {NUM_SPECIAL} text ids and at least 2 image ids, "
                f"not {self.text_vocab} and {self.image_vocab}"
            )

    @property
    def num_image_tokens(self) -> int:
        """N, the cells of the grid."""
        return self.grid_size * self.grid_size

    @property
    def num_inputs(self) -> int:
        """Tokens the transformer reads for a whole picture: T + N - 1."""
        return self.text_length + self.num_image_tokens - 1

    @property
    def first_image_output(self) -> int:
        """Index of the output that predicts image id 0: that of the last text slot."""
        return self.text_length - 1

    def text_positions(self) -> Tensor:
        """Positions of the text slots, (T,) int64: 0 … T-1."""
        return torch.arange(self.text_length)

    def image_positions(self) -> Tensor:
        """(row, column) of each image slot, (N, 2) int64; they don't depend on the length of a caption."""
        cell = torch.arange(self.num_image_tokens)
        return torch.stack([cell // self.grid_size, cell % self.grid_size], dim=1)

    def null_caption(self) -> Tensor:
        """The caption that says nothing, (T,) int64: it stands for a dropped or missing caption."""
        return torch.full((self.text_length,), NULL, dtype=torch.long)

    def fit_caption(self, pieces: list[int]) -> tuple[list[int], bool]:
        """Frames a caption's pieces as BOS … EOS, cut and padded to T slots; also tells whether it was cut."""
        room = self.text_length - 2
        ids = [BOS, *pieces[:room], EOS]
        return ids + [PAD] * (self.text_length - len(ids)), len(pieces) > room

    def check_text(self, text_ids: Tensor) -> None:
        """Raises ValueError unless text_ids is (B, T)."""
        if text_ids.ndim != 2 or text_ids.shape[1] != self.text_length:
            raise ValueError(f"text_ids have shape {tuple(text_ids.shape)}; expected (B, {self.text_length})")

    def check_image(self, image_ids: Tensor) -> None:
        """Raises ValueError unless image_ids is (B, n) with 0 ≤ n ≤ N."""
        if image_ids.ndim != 2 or image_ids.shape[1] > self.num_image_tokens:
            raise ValueError(
                f"image_ids have shape {tuple(image_ids.shape)}; expected (B, n) with n at most {self.num_image_tokens}"
            )
