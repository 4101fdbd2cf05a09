"""Stopping politely: SIGTERM and Ctrl-C let the current step finish and its state be saved."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ECHO_SEC = 1.0
"""Seconds in which a second signal is the first one's echo: `timeout` sends one to the process and one to its group."""


class StopSignal:
    """Turns SIGTERM and Ctrl-C into KeyboardInterrupt, or into a mere wish to stop where one is waited for.

    A context manager that may be entered again inside of itself. What can be done again, such as reading pictures, is
    interrupted at once; inside of `waiting` the wish is only noted in `requested`, until a second signal comes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.requested = False
        self.clock = clock
        self._requested_at = 0.0
        self._depth = self._num_waiting = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous.clear()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While this is open, a first signal is only noted: whoever opened it looks at `requested`."""
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1

    def is_requested(self) -> bool:
        """`requested`; being called lets Python handle a signal that came while C code was waiting."""
        return self.requested

    def _handle(self, number: int, frame: object) -> None:
        now = self.clock()
        if self.requested and now - self._requested_at < ECHO_SEC:
            return
        first, self.requested, self._requested_at = not self.requested, True, now
        if not (first and self._num_waiting):
            raise KeyboardInterrupt
