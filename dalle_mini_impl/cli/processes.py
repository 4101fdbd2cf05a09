"""The process's device and its place among the others, for verbs that draw or rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


def process_state() -> PartialState:
    """What Accelerate knows of this process: `device`, `process_index`, `num_processes`, `is_main_process`."""
    import torch
    from accelerate import PartialState

    # Accelerate has to be told of CPUs, or processes on them stay strangers to each other.
    return PartialState(cpu=not torch.accelerator.is_available())
