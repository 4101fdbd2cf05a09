"""Where memory runs out: work on fewer pictures at a time, or one clear error about what didn't fit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

logger = logging.getLogger("dalle_mini_impl")

Indices = npt.NDArray[np.int64]
Result = TypeVar("Result")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the CPU had too little memory."""
    from accelerate.utils.memory import should_reduce_batch_size  # a second to import, for what hardly ever happens

    known = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
    return known or "not enough memory" in str(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's words: those of the allocators go on for many."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def free_what_is_left() -> None:
    """Frees what a failed pass has left; not in the handler of its error, which keeps all of that alive."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)


@contextlib.contextmanager
def explained(what: str, remedy: str) -> Iterator[None]:
    """Makes of memory that ran out a MemoryError that says what was being done, and what helps."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    else:
        return
    raise MemoryError(f"{what} is too much for the memory ({reason}); {remedy}")


class FittingChunks:
    """Cuts work on many pictures into chunks; where memory runs out into smaller ones, from then on.

    size: pictures of a chunk to begin with.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def map(self, work: Callable[[Indices], Result], indices: Indices) -> Iterator[Result]:
        """What `work` makes of each chunk of some pictures, in their order.

        work: what it does for a chunk must not depend on the others in it, nor have counted where it fails: its
        pictures come again, fewer at a time. It may wait for no other process, which may have other chunks.
        Raises the error as it is where a single picture is too much.
        """
        done = 0
        while done < len(indices):
            chunk = indices[done : done + self.size]
            try:
                result = work(chunk)
            except RuntimeError as error:
                if len(chunk) == 1 or not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            else:
                done += len(chunk)
                yield result
                continue
            self._halve(len(chunk), reason)

    def _halve(self, tried: int, reason: str) -> None:
        free_what_is_left()
        self.size = tried // 2
        logger.warning(
            "%d pictures at a time are too much for the memory (%s); goes on with %d at a time, the result stays the "
            "same",
            tried,
            reason,
            self.size,
        )
