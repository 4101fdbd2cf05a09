"""Texts and pictures to CLIP's space: one interface for our own CLIP and for pretrained ones (`pretrained_clip`).

Ranking, classifying, searching and guiding know nothing else of a CLIP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dalle_mini_impl.clip import CLIP
from dalle_mini_impl.config import Fit
from dalle_mini_impl.data.pictures import to_rgb, to_square
from dalle_mini_impl.text import TextTokenizer

Pictures = Tensor | Iterable[Image.Image]
"""Squares (n, 3, S, S) in [0, 1], or PIL images of any size and mode, which are read one after the other."""


class Embedder(Protocol):
    """A CLIP that takes pictures and strings as they are, and gives unit vectors.

    A text and a picture belong together by the logit scale × cosine + bias.
    """

    @property
    def name(self) -> str:
        """What it is called, with a hash of its weights: vectors of embedders of one name can be compared."""

    @property
    def scale(self) -> float:
        """What a cosine is multiplied by to be a log-likelihood, but for a constant."""

    @property
    def bias(self) -> float:
        """The constant, where it was trained with one (SigLIP), else 0."""

    @property
    def image_size(self) -> int:
        """Side in pixels of the squares that the model sees in the end."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def module(self) -> nn.Module:
        """The model itself."""

    def encode_texts(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Unit vectors (n, E) fp32 of texts, on the CPU; ValueError for none."""

    def encode_pictures(self, pictures: Pictures, batch_size: int = 64) -> Tensor:
        """Unit vectors (n, E) fp32 of pictures, preprocessed as in its training, on the CPU; ValueError for none."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit vectors (n, E) fp32 of squares (n, 3, S, S) in [0, 1] of any side S, with a gradient, on its device."""


@dataclass(frozen=True)
class OwnCLIP:
    """A CLIP that was trained here, as an `Embedder`. fit: how pictures are made square."""

    clip: CLIP
    tokenizer: TextTokenizer
    name: str = "unsaved"
    fit: Fit = "crop"

    @property
    def scale(self) -> float:
        """See `Embedder`."""
        return self.clip.scale

    @property
    def bias(self) -> float:
        """See `Embedder`."""
        return 0.0 if self.clip.logit_bias is None else float(self.clip.logit_bias.detach())

    @property
    def image_size(self) -> int:
        """See `Embedder`."""
        return self.clip.image_size

    @property
    def device(self) -> torch.device:
        """See `Embedder`."""
        return self.clip.logit_scale.device

    @property
    def module(self) -> nn.Module:
        """See `Embedder`."""
        return self.clip

    def encode_texts(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """See `Embedder`."""
        return encode_texts(self.clip, self.tokenizer, texts, batch_size)

    def encode_pictures(self, pictures: Pictures, batch_size: int = 64) -> Tensor:
        """See `Embedder`; squares must have the side that the model was trained on."""
        if isinstance(pictures, Tensor):
            return encode_pictures(self.clip, pictures, batch_size)
        vectors = [encode_pictures(self.clip, part) for part in stacked(pictures, self._pixels, batch_size)]
        return joined(vectors)

    def encode_image(self, images: Tensor) -> Tensor:
        """See `Embedder`."""
        return self.clip.encode_image(resized(images, self.image_size))

    def _pixels(self, picture: Image.Image) -> Tensor:
        square = to_square(to_rgb(picture), self.image_size, self.fit)
        return torch.from_numpy(square).permute(2, 0, 1).float() / 255


@torch.no_grad()
def encode_texts(clip: CLIP, tokenizer: TextTokenizer, texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """Unit vectors (n, E) fp32 of texts by our own CLIP, on the CPU; ValueError for none."""
    if not texts:
        raise ValueError("there is no text to encode")
    ids, _ = tokenizer.batch(list(texts), clip.text_length)
    device = clip.logit_scale.device
    return torch.cat([clip.encode_text(part.to(device)).cpu() for part in torch.split(ids, batch_size)])


@torch.no_grad()
def encode_pictures(clip: CLIP, pictures: Tensor, batch_size: int = 64) -> Tensor:
    """Unit vectors (n, E) fp32 of pictures (n, 3, S, S) in [0, 1] by our own CLIP, on the CPU; ValueError for none."""
    device = clip.logit_scale.device
    return joined([clip.encode_image(part.to(device)).cpu() for part in torch.split(pictures, batch_size) if len(part)])


def stacked(
    pictures: Iterable[Image.Image], pixels: Callable[[Image.Image], Tensor], batch_size: int
) -> Iterator[Tensor]:
    """The pixels (3, S, S) of pictures, (n, 3, S, S) batch_size at a time; no more pictures are in memory."""
    part: list[Tensor] = []
    for picture in pictures:
        part.append(pixels(picture))
        if len(part) == batch_size:
            yield torch.stack(part)
            part = []
    if part:
        yield torch.stack(part)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Vectors (n, E) of pictures that were encoded some at a time; ValueError for none."""
    if not parts:
        raise ValueError("there is no readable picture")
    return torch.cat(list(parts))


def resized(images: Tensor, side: int) -> Tensor:
    """Squares (n, 3, S, S) brought to another side, antialiased, with a gradient."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
