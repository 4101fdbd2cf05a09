"""The id cache: every picture's image ids, encoded once, memory-mapped, in the recipe's views.

FOLDER/tokens.npy   uint16 (V, M, N): views, pictures, tokens of a picture
FOLDER/tokens.json  the fingerprint of the weights, pictures and views it was made from
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dalle_mini_impl.config import MOST_CODES, View
from dalle_mini_impl.data.array_cache import Workers, build_array, open_array, weights_digest
from dalle_mini_impl.data.views import apply_view
from dalle_mini_impl.out_of_memory import FittingChunks
from dalle_mini_impl.vae.model import DiscreteVAE

_NAME = "tokens"


def images_from_pixels(pixels: Tensor) -> Tensor:
    """uint8 pictures (B, S, S, 3) to float32 (B, 3, S, S) in [0, 1], on their own device."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255)


def cache_fingerprint(vae: DiscreteVAE, data_fingerprint: str, views: Sequence[View]) -> str:
    """Changes when the pictures, the views or the VAE's weights do, but for the decoder's, which no id depends on."""
    return weights_digest(vae, data_fingerprint, list(views), without="decoder.")


class TokenCache:
    """Image ids of all pictures in all views."""

    def __init__(self, tokens: npt.NDArray[np.uint16], num_codes: int) -> None:
        self.tokens = tokens
        """uint16 (V, M, N), read-only."""
        self.num_codes = num_codes

    @property
    def num_views(self) -> int:
        """V."""
        return int(self.tokens.shape[0])

    def ids(self, pictures: npt.NDArray[np.int64], views: npt.NDArray[np.int64] | int = 0) -> Tensor:
        """Ids (B, N) int64 of some pictures, each in its view."""
        return torch.from_numpy(self.tokens[views, pictures].astype(np.int64))

    def counts(self, pictures: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How often each code occurs in the plain view of some pictures, (num_codes,)."""
        counts = np.zeros(self.num_codes, dtype=np.int64)
        for chunk in np.array_split(pictures, max(1, len(pictures) // 4096)):
            counts += np.bincount(self.tokens[0, chunk].ravel(), minlength=self.num_codes)
        return counts

    @classmethod
    def open(cls, folder: Path, fingerprint: str) -> TokenCache | None:
        """The cache in a folder, None where there is none or it is stale."""
        found = open_array(folder, _NAME, fingerprint)
        return None if found is None else cls(found[0], found[1]["num_codes"])

    @classmethod
    def build(
        cls,
        folder: Path,
        vae: DiscreteVAE,
        pictures: npt.NDArray[np.uint8],
        views: Sequence[View],
        fingerprint: str,
        *,
        batch_size: int = 128,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        workers: Workers = Workers(),
        progress: Callable[[int, int], None] | None = None,
    ) -> TokenCache:
        """Encodes pictures uint8 (M, S, S, 3); each process its share, into one file.

        batch_size: pictures to encode at once, fewer where memory runs out; it doesn't change the ids.
        progress: called with the pictures done and to do by this process.
        Raises ValueError for more codes than an uint16 holds.
        """
        if vae.num_codes > MOST_CODES:
            raise ValueError(f"the id cache holds up to {MOST_CODES} codes; the VAE has {vae.num_codes}")
        build_array(
            folder,
            _NAME,
            fingerprint,
            (len(views), len(pictures), vae.grid_size**2),
            np.uint16,
            lambda tokens, share: _encode_share(tokens, vae, pictures, views, share, batch_size, autocast, progress),
            workers,
            {"num_codes": vae.num_codes, "views": list(views)},
        )
        cache = cls.open(folder, fingerprint)
        assert cache is not None
        return cache


@torch.no_grad()
def _encode_share(
    tokens: npt.NDArray[np.uint16],
    vae: DiscreteVAE,
    pictures: npt.NDArray[np.uint8],
    views: Sequence[View],
    share: npt.NDArray[np.int64],
    batch_size: int,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fills in the ids of one process's pictures."""
    device = next(vae.parameters()).device
    was_training = vae.training
    vae.eval()

    def encode(chunk: npt.NDArray[np.int64]) -> int:
        images = images_from_pixels(torch.from_numpy(pictures[chunk]).to(device))
        for number, view in enumerate(views):
            with autocast():
                ids = vae.encode(apply_view(images, view))
            tokens[number, chunk] = ids.cpu().numpy().astype(np.uint16)
        return len(chunk)

    for done in itertools.accumulate(FittingChunks(batch_size).map(encode, share)):
        if progress is not None:
            progress(done, len(share))
    vae.train(was_training)


def unigram_nll(train_counts: npt.NDArray[np.int64], held_out_counts: npt.NDArray[np.int64]) -> float:
    """Nats a token that held-out ids cost under the (add-one smoothed) frequencies of the training ids.

    What a model reaches that knows nothing but how common each code is: the floor of knowing nothing.
    """
    smoothed = train_counts + 1.0
    log_probs = np.log(smoothed / smoothed.sum())
    return float(-(held_out_counts * log_probs).sum() / max(1, held_out_counts.sum()))
