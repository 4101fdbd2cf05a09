"""The process's device and its place among the others, and how they end together."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState

_LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "NCCL error")
"""What Gloo and NCCL say where another process has gone."""

_LET_GO_SEC = 0.2


class LostProcessError(Exception):
    """Another process has ended while this one waited for it."""


def process_state() -> PartialState:
    """What Accelerate knows of this process: `device`, `process_index`, `num_processes`, `is_main_process`."""
    import torch
    from accelerate import PartialState

    # Accelerate has to be told of CPUs, or processes on them stay strangers to each other.
    return PartialState(cpu=not torch.accelerator.is_available())


@contextlib.contextmanager
def leaving_together() -> Iterator[None]:
    """Lets processes that were launched together end together.

    Each waits for the others before it closes its connections, and closes them itself: left to the end of the
    interpreter, threads that still listen to a process that has gone can take this one down with them. So can a thread
    of Gloo's that lets go of the last collective's tensors only then, which takes Python's lock: it is given a moment.
    A process that fails or is interrupted doesn't wait for the others; where closing would (see `ending_at_once`), it
    leaves its connections as they are. Raises LostProcessError where another one failed, which has said why.
    """
    is_done = False
    try:
        yield
        if _are_connected():
            process_state().wait_for_everyone()
        is_done = True
    except RuntimeError as error:
        if _are_connected() and any(words in str(error) for words in _LOST):
            raise LostProcessError("another process has ended, so that this one can't go on") from None
        raise
    finally:
        if _are_connected() and (is_done or not _closing_waits()):
            process_state().destroy_process_group()
            time.sleep(_LET_GO_SEC)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Ends the process itself where it fails while it is connected to others by NCCL.

    NCCL closes connections, at the interpreter's end at the latest, only once all that is queued on the GPU is done,
    and a collective that the others wait in is never done without this process. It would hang with them, instead of
    ending, so that the launcher ends them, too. What went wrong has to be said inside; a traceback is printed here.
    """
    try:
        yield
    except BaseException as error:
        if not _closing_waits():
            raise
        status = getattr(error, "exit_code", getattr(error, "code", 1))
        if not isinstance(error, SystemExit) and not hasattr(error, "exit_code"):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def _closing_waits() -> bool:
    """Whether connections are open whose closing waits for the other processes."""
    if not _are_connected():
        return False
    import torch

    return torch.distributed.get_backend() != "gloo"


def _are_connected() -> bool:
    """Whether this process is connected to others; torch is not loaded to find out."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
