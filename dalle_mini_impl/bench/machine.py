"""What the machine can do, measured here and now: the yardstick of every other number."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

_MATMUL_SIDE = 2048
_READ_BYTES = 512 * 2**20
_ENOUGH_SEC = 10.0


@dataclass(frozen=True)
class Machine:
    """Rates of the device that the benchmark runs on.

    flops: of large matrix products in bf16 and fp32, in operations a second (a multiply-add counts two). read_rate:
    bytes a second of reading memory that no cache holds.
    """

    device: str
    threads: int
    flops: dict[str, float]
    read_rate: float

    def least_sec(self, flops: float, read_bytes: float, dtype: torch.dtype) -> float:
        """The least time that so many operations and bytes can take: whichever is the slower of the two."""
        return max(flops / self.flops[str(dtype).removeprefix("torch.")], read_bytes / self.read_rate)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_sec(work: Callable[[], object], device: torch.device, least_sec: float = 0.5) -> float:
    """The shortest time of one call, over least_sec seconds of them and at least three, or as many as start in 10 s.

    One call warms up.
    """
    work()
    synchronize(device)
    best, calls, began = float("inf"), 0, time.perf_counter()
    while (calls < 3 and time.perf_counter() - began < _ENOUGH_SEC) or time.perf_counter() - began < least_sec:
        start = time.perf_counter()
        work()
        synchronize(device)
        best, calls = min(best, time.perf_counter() - start), calls + 1
    return best


def measure_machine(device: torch.device) -> Machine:
    """Measures matrix products and memory reads of a device, in about three seconds."""
    flops = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(_MATMUL_SIDE, _MATMUL_SIDE, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = best_sec(partial(torch.mm, a, b, out=out), device)
        flops[str(dtype).removeprefix("torch.")] = 2 * _MATMUL_SIDE**3 / seconds
    memory: Tensor = torch.ones(_READ_BYTES // 4, device=device)
    read_rate = _READ_BYTES / best_sec(memory.sum, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Machine(name, torch.get_num_threads(), flops, read_rate)
