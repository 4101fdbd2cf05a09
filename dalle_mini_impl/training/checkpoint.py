"""The resumable state of a stage.

A state is written under a temporary name, flushed to the disk and renamed; an index with its SHA-256 follows the same
way. Killed at any moment, a run finds the last state that was complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dalle_mini_impl.files import write_atomically, write_json

KEPT_STATES = 2


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as safetensors, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=dict(metadata or {})))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file."""
    return load_file(path)


class StateFolder:
    """The states of one stage: the newest KEPT_STATES of them, an index, and a mark when the stage is finished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index_path = folder / "index.json"
        self.finished_path = folder / "finished.json"
        self.best_path = folder / "best.safetensors"

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
        """Adds a state; state["step"] is the number of steps that are done."""
        path = self.folder / f"step-{state['step']:08d}.pt"
        write_atomically(path, lambda temporary: torch.save(state, temporary))
        entries = [entry for entry in self._entries() if entry["file"] != path.name]
        entries.append({"file": path.name, "step": state["step"], "sha256": _sha256(path)})
        write_json(self.index_path, entries[-KEPT_STATES:])
        kept = {entry["file"] for entry in entries[-KEPT_STATES:]}
        for old in self.folder.glob("step-*.pt"):
            if old.name not in kept:
                old.unlink(missing_ok=True)

    def load(self) -> dict[str, Any]:
        """The newest state. Raises ValueError that names the file where it is missing or damaged."""
        entry = self._entries()[-1]
        path = self.folder / entry["file"]
        if not path.is_file():
            raise ValueError(f"{path} is missing; delete {self.folder} to start the stage over")
        if _sha256(path) != entry["sha256"]:
            raise ValueError(
                f"{path} is damaged (its SHA-256 is not the one noted when it was written); remove its entry from "
                f"{self.index_path} to go on from the state before, or delete {self.folder} to start the stage over"
            )
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Marks the stage as finished and removes its resumable states, which nothing needs any more."""
        write_json(self.finished_path, dict(summary))
        self.index_path.unlink(missing_ok=True)
        for old in self.folder.glob("step-*.pt"):
            old.unlink(missing_ok=True)

    def summary(self) -> dict[str, Any]:
        """What `finish` noted."""
        summary: dict[str, Any] = json.loads(self.finished_path.read_text(encoding="utf-8"))
        return summary

    def _entries(self) -> list[dict[str, Any]]:
        if not self.index_path.is_file():
            return []
        entries: list[dict[str, Any]] = json.loads(self.index_path.read_text(encoding="utf-8"))
        return entries


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
