"""CLIP's embedding of every picture, computed once, memory-mapped, in the recipe's views.

FOLDER/embeddings.npy   float16 (V, M, E): views, pictures, dimensions of CLIP's space
FOLDER/embeddings.json  the fingerprint of the weights, pictures and views it was made from
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
import torch.nn.functional as F
from torch import Tensor

from dalle_mini_impl.clip import CLIP
from dalle_mini_impl.config import View
from dalle_mini_impl.data.array_cache import Workers, build_array, open_array, weights_digest
from dalle_mini_impl.data.token_cache import images_from_pixels
from dalle_mini_impl.data.views import apply_view
from dalle_mini_impl.out_of_memory import FittingChunks

_NAME = "embeddings"


def embedding_fingerprint(clip: CLIP, data_fingerprint: str, views: Sequence[View]) -> str:
    """Changes when CLIP's weights, the pictures or the views do."""
    return weights_digest(clip, data_fingerprint, list(views))


class EmbeddingCache:
    """Embeddings of all pictures in all views."""

    def __init__(self, embeddings: npt.NDArray[np.float16]) -> None:
        self.embeddings = embeddings
        """float16 (V, M, E), read-only."""

    def vectors(self, pictures: npt.NDArray[np.int64], views: npt.NDArray[np.int64] | int = 0) -> Tensor:
        """Unit vectors (B, E) float32 of some pictures, each in its view."""
        return F.normalize(torch.from_numpy(self.embeddings[views, pictures].astype(np.float32)), dim=1)

    @classmethod
    def open(cls, folder: Path, fingerprint: str) -> EmbeddingCache | None:
        """The cache in a folder, None where there is none or it is stale."""
        found = open_array(folder, _NAME, fingerprint)
        return None if found is None else cls(found[0])

    @classmethod
    def build(
        cls,
        folder: Path,
        clip: CLIP,
        pictures: npt.NDArray[np.uint8],
        views: Sequence[View],
        fingerprint: str,
        *,
        batch_size: int = 128,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        workers: Workers = Workers(),
        progress: Callable[[int, int], None] | None = None,
    ) -> EmbeddingCache:
        """Embeds pictures uint8 (M, S, S, 3); each process its share, into one file.

        batch_size: pictures to embed at once, fewer where memory runs out; it doesn't change the result.
        progress: called with the pictures done and to do by this process.
        """
        device = clip.logit_scale.device
        was_training = clip.training

        @torch.no_grad()
        def fill(embeddings: npt.NDArray[Any], share: npt.NDArray[np.int64]) -> None:
            def embed(chunk: npt.NDArray[np.int64]) -> int:
                images = images_from_pixels(torch.from_numpy(pictures[chunk]).to(device))
                for number, view in enumerate(views):
                    with autocast():
                        vectors = clip.encode_image(apply_view(images, view))
                    embeddings[number, chunk] = vectors.half().cpu().numpy()
                return len(chunk)

            for done in itertools.accumulate(FittingChunks(batch_size).map(embed, share)):
                if progress is not None:
                    progress(done, len(share))

        clip.eval()
        shape = len(views), len(pictures), clip.config.embed_dim
        build_array(folder, _NAME, fingerprint, shape, np.float16, fill, workers, {"views": list(views)})
        clip.train(was_training)
        cache = cls.open(folder, fingerprint)
        assert cache is not None
        return cache
