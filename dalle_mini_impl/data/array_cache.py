"""What is computed once for all pictures and kept as a memory-mapped array: FOLDER/NAME.npy, made by all processes.

FOLDER/NAME.json holds the fingerprint of what it was made from. Neither is there before it is whole, and what is there
is replaced, not changed: another process may have it mapped, and a link leads to another run.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dalle_mini_impl.files import remove_leftovers, reserve, write_json

Fill = Callable[[npt.NDArray[Any], npt.NDArray[np.int64]], None]
"""Fills in the places (second axis) of one process's pictures."""


@dataclass(frozen=True)
class Workers:
    """This process among those that fill an array together.

    barrier: waits for all of them. first_pid: of the process of rank 0; it is in the name of what isn't whole yet.
    """

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None
    first_pid: int = field(default_factory=os.getpid)


def weights_digest(model: nn.Module, *keys: Any, without: str | None = None) -> str:
    """Changes when a model's weights or one of the keys (JSON values) does; weights named `without`… don't count."""
    digest = hashlib.sha256(json.dumps(list(keys)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if without is not None and name.startswith(without):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def open_array(folder: Path, name: str, fingerprint: str) -> tuple[npt.NDArray[Any], dict[str, Any]] | None:
    """The array in a folder, read-only, and its facts; None where there is none or it is stale."""
    try:
        facts: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        if facts["fingerprint"] != fingerprint:
            return None
        return np.load(folder / f"{name}.npy", mmap_mode="r"), facts
    except (OSError, ValueError, KeyError):
        return None


def build_array(
    folder: Path,
    name: str,
    fingerprint: str,
    shape: tuple[int, int, int],
    dtype: npt.DTypeLike,
    fill: Fill,
    workers: Workers,
    facts: Mapping[str, Any],
) -> None:
    """Makes an array (V, M, …) of M pictures, each process its share of them; facts are noted beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}.npy.{workers.first_pid}.partial"
    if workers.rank == 0:
        remove_leftovers(folder, f".{glob.escape(name)}.npy.*.partial")
        (folder / f"{name}.json").unlink(missing_ok=True)
        np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape).flush()
        reserve(partial)
    workers.barrier()
    array = np.lib.format.open_memmap(partial, mode="r+")
    fill(array, np.array_split(np.arange(shape[1]), workers.world_size)[workers.rank])
    array.flush()
    workers.barrier()
    if workers.rank == 0:
        os.replace(partial, folder / f"{name}.npy")
        write_json(folder / f"{name}.json", {"fingerprint": fingerprint, **facts})
    workers.barrier()
