"""The most memory that something takes, measured in a process of its own, where nothing else has left its mark."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dalle_mini_impl.memory import keep_freed_memory

_STATUS = Path("/proc/self/status")


def peak_bytes_alone(device: torch.device, work: Callable[..., object], *arguments: Any) -> int:
    """Most memory that `work(*arguments)` has tensors hold on a GPU, or all of its process where the device is a CPU.

    The process computes with as many threads as this one, and keeps freed memory as commands do. On a CPU Python and
    PyTorch themselves are part of it. work: a function of a module, since another process has to find it.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, device, torch.get_num_threads(), work, arguments).result()


def _measure(device: torch.device, threads: int, work: Callable[..., object], arguments: tuple[Any, ...]) -> int:
    torch.set_num_threads(threads)
    keep_freed_memory()
    work(*arguments)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_rss_bytes()


def _peak_rss_bytes() -> int:
    """Of this process. On Linux getrusage has it from the one that started this one, if that was larger."""
    if _STATUS.is_file():
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
