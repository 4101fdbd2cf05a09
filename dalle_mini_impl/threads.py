"""How many threads a process computes with."""

from __future__ import annotations

import os

_LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


def use_all_cores() -> int | None:
    """Shares the machine's cores out to its processes where a launcher has left each a single thread.

    `accelerate launch` sets OMP_NUM_THREADS to 1 unless it is told otherwise, which leaves all cores but one idle. Any
    other number is somebody's wish and stays; to have one thread, let the process run on one core (taskset). Has to
    come before torch is imported. Returns the new number, None where nothing was changed.
    """
    if os.environ.get("OMP_NUM_THREADS") != "1" or not any(name in os.environ for name in _LAUNCHED):
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return threads
