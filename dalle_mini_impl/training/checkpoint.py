"""The resumable state of a stage.

A state is written under a temporary name, flushed to the disk and renamed; an index with its SHA-256 follows the same
way. Killed at any moment, a run finds the last state that was complete. Where that one has been damaged since, the
one before is as good: it leads through the same steps once more.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_mini_impl.files import read_json, write_atomically, write_json
from dalle_mini_impl.weights import load_weights, save_weights

logger = logging.getLogger("dalle_mini_impl.training")

KEPT_STATES = 2
_FIRST_BEST = "best.safetensors"  # what states call it that don't say


class StateFolder:
    """The states of one stage: the newest KEPT_STATES of them, an index, and a mark when the stage is finished.

    Beside them lie the weights of the best evaluation that each of these states knows of.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index_path = folder / "index.json"
        self.finished_path = folder / "finished.json"
        self.micro_batch_path = folder / "micro-batch.json"
        self._damaged: set[str] = set()

    @property
    def finished(self) -> bool:
        """Whether the stage has run to its end."""
        return self.finished_path.is_file()

    @property
    def started(self) -> bool:
        """Whether there is a state to resume from."""
        return self.index_path.is_file()

    @property
    def step(self) -> int:
        """Steps that are done in the newest state, 0 where there is none."""
        return int(self._entries()[-1]["step"]) if self.started else 0

    def save(self, state: dict[str, Any]) -> None:
        """Adds a state; state["step"] is the number of steps that are done, state["best_file"] its best weights.

        The newest state so far is not written over, though it may be of the same step: until the index says otherwise
        it is the one to go on from.
        """
        name = f"step-{state['step']:08d}"
        newest = self._entries()[-1]["file"] if self.started else None
        path = self.folder / (f"{name}-again.pt" if newest == f"{name}.pt" else f"{name}.pt")
        write_atomically(path, lambda temporary: torch.save(state, temporary))
        entry = {"file": path.name, "step": state["step"], "sha256": _sha256(path), "best": state.get("best_file")}
        self._damaged.discard(path.name)
        others = [old for old in self._entries() if old["file"] not in {path.name, *self._damaged}]
        entries = [*others, entry][-KEPT_STATES:]
        write_json(self.index_path, entries)
        self._remove_all_but({entry["file"] for entry in entries} | {entry.get("best") for entry in entries})

    def load(self) -> dict[str, Any]:
        """The newest state that is whole; warns of those that aren't.

        Raises ValueError that names what is missing or damaged where none is.
        """
        faults: list[str] = []
        for entry in reversed(self._entries()):
            fault = self._fault(entry)
            if fault is None:
                for text in faults:
                    logger.warning("%s; goes on from step %d, the state before", text, entry["step"])
                state: dict[str, Any] = torch.load(self.folder / entry["file"], map_location="cpu", weights_only=True)
                return {"best_file": None if state.get("best") is None else _FIRST_BEST, **state}
            self._damaged.add(entry["file"])
            faults.append(fault)
        raise ValueError(f"{'; '.join(faults)}; {self._start_over}")

    @staticmethod
    def best_name(step: int) -> str:
        """The file of the weights of the best evaluation so far, to be put into the state as "best_file"."""
        return f"best-{step:08d}.safetensors"

    def save_best(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Writes the weights of the best evaluation so far."""
        save_weights(self.folder / name, weights)

    def load_best(self, name: str) -> dict[str, Tensor]:
        """What `save_best` wrote. Raises ValueError that names the file where it is damaged."""
        return load_weights(self.folder / name, self._start_over)

    def note_micro_batch_size(self, size: int) -> None:
        """Notes the largest micro-batch to try when the stage is gone on with, for want of memory."""
        write_json(self.micro_batch_path, {"micro_batch_size": size})

    def noted_micro_batch_size(self) -> int | None:
        """What `note_micro_batch_size` noted."""
        if not self.micro_batch_path.is_file():
            return None
        return int(read_json(self.micro_batch_path, "delete it")["micro_batch_size"])

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Marks the stage as finished and removes its resumable states, which nothing needs any more."""
        write_json(self.finished_path, dict(summary))
        self.index_path.unlink(missing_ok=True)
        self.micro_batch_path.unlink(missing_ok=True)
        for old in self.folder.glob("step-*.pt"):
            old.unlink(missing_ok=True)

    def summary(self) -> dict[str, Any]:
        """What `finish` noted."""
        summary: dict[str, Any] = read_json(self.finished_path, self._start_over)
        return summary

    @property
    def _start_over(self) -> str:
        return f"delete {self.folder} to start the stage over"

    def _entries(self) -> list[dict[str, Any]]:
        if not self.index_path.is_file():
            return []
        entries: list[dict[str, Any]] = read_json(self.index_path, self._start_over)
        if not entries or not all({"file", "step", "sha256"} <= set(entry) for entry in entries):
            raise ValueError(f"{self.index_path} is damaged (a state has no file, step or sha256); {self._start_over}")
        return entries

    def _fault(self, entry: Mapping[str, Any]) -> str | None:
        """What keeps a state from being used, None where nothing does."""
        path = self.folder / entry["file"]
        if not path.is_file():
            return f"{path} is missing"
        if _sha256(path) != entry["sha256"]:
            return f"{path} is damaged (its SHA-256 is not the one noted when it was written)"
        if entry.get("best") is not None:
            try:
                self.load_best(entry["best"])
            except ValueError as error:
                return str(error)
        return None

    def _remove_all_but(self, kept: set[str | None]) -> None:
        for pattern in ("step-*.pt", "best*.safetensors", ".step-*.tmp", ".best-*.tmp"):
            for old in self.folder.glob(pattern):
                if old.name not in kept:
                    old.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
