"""How many threads a process computes with."""

from __future__ import annotations

import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


def use_all_cores() -> int | None:
    """Shares the machine's cores out to its processes where a launcher or a container says nothing true of them.

    `accelerate launch` sets OMP_NUM_THREADS to 1 unless it is told otherwise, which leaves all cores but one idle. A
    container that may use two of 64 cores shows all of them, and 64 threads that wait for each other use its time up.
    Any other number is somebody's wish and stays; to have one thread, let the process run on one core (taskset). Has to
    come before torch is imported. Returns the new number, None where nothing was changed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = min(cores, _quota() or cores)
    is_launched = os.environ.get("OMP_NUM_THREADS") == "1" and any(name in os.environ for name in _LAUNCHED)
    if not is_launched and ("OMP_NUM_THREADS" in os.environ or allowed == cores):
        return None
    threads = max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return threads


def _quota() -> int | None:
    """How many cores' time this container may use (cgroup v2), rounded up; None where nothing limits it."""
    try:
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        return None if quota == "max" else max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        return None
