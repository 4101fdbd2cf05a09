"""The processes of a run: the launcher's, over one folder that all of them see."""

from __future__ import annotations

import os
import socket
import uuid
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object

from dalle_mini_impl.data.array_cache import Workers
from dalle_mini_impl.files import FolderLock

LONGEST_WAIT = timedelta(hours=24)
"""How long processes wait for each other: the first one may read pictures for hours. One that dies ends the others."""
OTHER_TRAINERS = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""What Accelerate hands whole steps to, so that ours would not be the ones that are made."""
LINGERING_SEC = 10.0
"""How long a run waits for an earlier one in its folder that is just ending."""


def make_accelerator() -> Accelerator:
    """The launcher's devices and processes; Accelerate has to be told of CPUs, or processes on them stay strangers.

    Whatever mixed precision the launcher is set to, a person's own default as a rule, stays out of it: that is
    train.STAGE.precision of the recipe.
    """
    patient = InitProcessGroupKwargs(timeout=LONGEST_WAIT)  # the default of GPUs is ten minutes
    is_cpu = not torch.accelerator.is_available()
    return Accelerator(cpu=is_cpu, mixed_precision="no", kwargs_handlers=[patient])


def check_settings(accelerator: Accelerator) -> None:
    """Raises ValueError for an Accelerator that would train otherwise than the recipe says, or not at all."""
    if accelerator.distributed_type in OTHER_TRAINERS:
        raise ValueError(
            f"{accelerator.distributed_type.value} isn't supported here: take one of configs/accelerate, such as "
            f"gpu8-fsdp.yaml for large models"
        )
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f'the Accelerator has mixed_precision {accelerator.mixed_precision!r}: set it to "no"; '
            f"train.STAGE.precision in the recipe says it"
        )


def keep_to_this_run(lock: FolderLock, accelerator: Accelerator) -> None:
    """Has the main process take a run's folder, if it is there yet.

    Raises ValueError on every process where another run has it, which may be one whose launcher was killed alone.
    """
    taken = [True]
    if accelerator.is_main_process and lock.folder.is_dir():
        taken = [lock.take(LINGERING_SEC)]
    if accelerator.num_processes > 1:
        broadcast_object_list(taken)
    if not taken[0]:
        raise ValueError(
            f"another process is still training in {lock.folder}: end it first (a launcher that was killed can leave "
            f"its processes behind), or choose another --out"
        )


def workers_of(accelerator: Accelerator) -> Workers:
    """The processes, as they fill an array together."""
    pids = [os.getpid()]
    if accelerator.num_processes > 1:
        broadcast_object_list(pids)
    return Workers(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone, pids[0])


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
