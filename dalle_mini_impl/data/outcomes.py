"""What becomes of each record of a source: a square picture, or the reason why it can't be used."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.pictures import PictureError, to_rgb, to_square
from dalle_mini_impl.data.records import Record

_WINDOW = 64  # records in flight: bounds the memory, keeps the order


@dataclass(frozen=True)
class Picture:
    """A picture that is kept."""

    pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
    captions: tuple[str, ...]
    digest: bytes


Outcome = Picture | PictureError


def without_blanks(captions: Iterable[str]) -> tuple[str, ...]:
    """The captions that have text in them, without spaces around it."""
    return tuple(caption.strip() for caption in captions if caption.strip())


def outcomes(records: Iterable[Record], config: DataConfig) -> Iterator[tuple[Record, Outcome]]:
    """Every record with what became of it, in their order; a few threads decode ahead."""
    waiting: deque[tuple[Record, Future[Outcome]]] = deque()
    # Pillow releases the interpreter lock while it decodes and resizes.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for record in records:
            waiting.append((record, pool.submit(_read, record, config)))
            if len(waiting) >= _WINDOW:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()


def _read(record: Record, config: DataConfig) -> Outcome:
    """Opens a picture and squares it; whatever goes wrong is an outcome, never an exception."""
    captions = without_blanks(record.captions)
    if record.captions and not captions:
        return PictureError("empty_caption", "no caption with text in it")
    try:
        image = to_rgb(record.load())
        # The pixels of the whole picture, so that a split depends neither on its file format nor on image_size.
        digest = hashlib.sha256(f"{image.width}x{image.height} ".encode() + image.tobytes()).digest()
        return Picture(to_square(image, config.image_size, config.fit), captions, digest)
    except PictureError as error:
        return error
    except Exception as error:  # one bad picture in a million must not end the run
        return PictureError("unreadable", f"{type(error).__name__}: {error}")
