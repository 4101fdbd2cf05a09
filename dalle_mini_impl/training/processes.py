"""The processes of a run: the launcher's, over one folder that all of them see."""

from __future__ import annotations

import socket
import uuid
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object

LONGEST_WAIT = timedelta(hours=24)
"""How long processes wait for each other: the first one may read pictures for hours. One that dies ends the others."""


def make_accelerator() -> Accelerator:
    """The launcher's devices and processes; Accelerate has to be told of CPUs, or processes on them stay strangers."""
    patient = InitProcessGroupKwargs(timeout=LONGEST_WAIT)  # the default of GPUs is ten minutes
    return Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patient])


def check_shared(folder: Path, accelerator: Accelerator) -> None:
    """Raises ValueError on every process where one of them, on another machine, doesn't see the main process's folder.

    Pictures, image ids, states and the checkpoint are written once and read by all.
    """
    if accelerator.num_processes == 1:
        return
    mark = folder / ".shared"
    names = [uuid.uuid4().hex]
    broadcast_object_list(names)
    if accelerator.is_main_process:
        mark.write_text(names[0], encoding="utf-8")
    accelerator.wait_for_everyone()
    seen = mark.is_file() and mark.read_text(encoding="utf-8") == names[0]
    blind = [place for place in gather_object([("" if seen else socket.gethostname())]) if place]
    if accelerator.is_main_process:
        mark.unlink()
    if blind:
        raise ValueError(
            f"{folder} is not the same folder on all machines ({len(blind)} processes don't see it, on "
            f"{', '.join(sorted(set(blind)))}): choose an --out on a disk that they share"
        )
