"""The token stream ``[text ids … | image ids …]``: its lengths, its grid, its positions, what may stand in each slot.

A picture embedding may stand ahead of it as a prefix of P tokens: ``[prefix | text ids … | image ids …]``. Slots are
numbered 0 … T-1 (text), T … T+N-1 (image), T+N … T+N+P-1 (prefix), so that a prefix moves no other slot.

This is the only file that knows offsets. Text and image ids live in separate vocabularies, so an id is never shifted.

With t ≤ T text slots and N image slots (a row-major square grid) the transformer reads t + N - 1 tokens: all text and
all image tokens but the last. The output at text slot j predicts text id j + 1; the output at the last text slot
predicts the first image id; the output at image slot i predicts image id i + 1.

A caption takes as many slots as it needs, rounded up to a multiple of `slot_step`, whatever it is batched with: short
captions are cheap, and no attention mask is needed. Text slots are counted back from the grid, so positions of
picture tokens don't depend on the caption. Captions travel as (B, T) ids padded with PAD; `groups` sorts them.
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

    text_length: T, most slots of a caption with its begin and end.
    grid_size: side of the square grid of image tokens; N = grid_size².
    text_vocab, image_vocab: sizes of the two vocabularies.
    slot_step: captions take a multiple of this many slots, or T; None means always T.
    image_prefix: P, tokens ahead of the caption that stand for a picture embedding.
    """

    text_length: int
    grid_size: int
    text_vocab: int
    image_vocab: int
    slot_step: int | None = None
    image_prefix: int = 0

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
        if self.image_prefix < 0:
            raise ValueError(f"image_prefix is {self.image_prefix}; it must be at least 0, which means no prefix")

    @property
    def num_image_tokens(self) -> int:
        """N, the cells of the grid."""
        return self.grid_size * self.grid_size

    @property
    def num_inputs(self) -> int:
        """Most tokens the transformer reads for a picture: P + T + N - 1."""
        return self.image_prefix + self.text_length + self.num_image_tokens - 1

    def prompt_slots(self, num_slots: int, device: torch.device | None = None) -> Tensor:
        """Slots of the prefix and of a caption of t slots, in the order in which they are read, (P + t,) int64."""
        end = self.text_length + self.num_image_tokens
        prefix = torch.arange(end, end + self.image_prefix, device=device)
        return torch.cat([prefix, torch.arange(self.text_length - num_slots, self.text_length, device=device)])

    def prefix_positions(self) -> Tensor:
        """Positions of the prefix slots, (P,) int64: -P … -1, ahead of the longest caption, however long one is."""
        return torch.arange(-self.image_prefix, 0)

    def text_positions(self) -> Tensor:
        """Positions of the text slots, (T,) int64: 0 … T-1."""
        return torch.arange(self.text_length)

    def image_positions(self) -> Tensor:
        """(row, column) of each image slot, (N, 2) int64; they don't depend on the length of a caption."""
        cell = torch.arange(self.num_image_tokens)
        return torch.stack([cell // self.grid_size, cell % self.grid_size], dim=1)

    def null_caption(self) -> Tensor:
        """The caption that says nothing, in all T slots, (T,) int64: it stands for a missing caption."""
        return torch.full((self.text_length,), NULL, dtype=torch.long)

    def num_slots(self, text_ids: Tensor) -> Tensor:
        """Slots that each of the captions (B, T) takes, (B,) int64."""
        step = self.slot_step or self.text_length
        needed = (text_ids != PAD).sum(dim=1).clamp(min=1)
        return ((needed + step - 1) // step * step).clamp(max=self.text_length)

    def groups(self, text_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Captions (B, T) sorted by their slots t: (row numbers (n,), ids (n, t)) of each t in use."""
        if self.slot_step is None and len(text_ids):  # one group: nothing to sort, and no wait for the device
            return [(torch.arange(len(text_ids), device=text_ids.device), text_ids)]
        slots = self.num_slots(text_ids)
        rows = [(slots == t).nonzero()[:, 0] for t in sorted(set(slots.tolist()))]
        return [(row, text_ids[row, : int(slots[row[0]])]) for row in rows]

    def null_captions(self, text_ids: Tensor) -> Tensor:
        """Captions that say nothing, in the slots that each of the captions (B, T) takes; (B, T) int64."""
        is_slot = torch.arange(self.text_length, device=text_ids.device) < self.num_slots(text_ids)[:, None]
        return torch.where(is_slot, NULL, PAD)

    def fit_caption(self, pieces: list[int]) -> tuple[list[int], bool]:
        """Frames a caption's pieces as BOS … EOS, cut and padded to T slots; also tells whether it was cut."""
        room = self.text_length - 2
        ids = [BOS, *pieces[:room], EOS]
        return ids + [PAD] * (self.text_length - len(ids)), len(pieces) > room

    def check_text(self, text_ids: Tensor) -> None:
        """Raises ValueError unless text_ids is (B, t) with t ≤ T slots."""
        if text_ids.ndim != 2 or not 1 <= text_ids.shape[1] <= self.text_length:
            raise ValueError(
                f"text_ids have shape {tuple(text_ids.shape)}; expected (B, t) with t at most {self.text_length}"
            )

    def check_image(self, image_ids: Tensor) -> None:
        """Raises ValueError unless image_ids is (B, n) with 0 ≤ n ≤ N."""
        if image_ids.ndim != 2 or image_ids.shape[1] > self.num_image_tokens:
            raise ValueError(
                f"image_ids have shape {tuple(image_ids.shape)}; expected (B, n) with n at most {self.num_image_tokens}"
            )
