"""The newest states are kept whole; damaged ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dalle_mini_impl.training.checkpoint import KEPT_STATES, StateFolder
from dalle_mini_impl.training.progress import MetricsLog


def test_the_last_states_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    states = StateFolder(tmp_path / "dalle")
    assert not states.started and not states.finished
    for step in (5, 10, 15, 15):
        states.save({"step": step, "weights": torch.full((3,), float(step))})
    assert states.started
    assert torch.equal(states.load()["weights"], torch.full((3,), 15.0))
    assert len(list(states.folder.glob("*.pt"))) == KEPT_STATES


def test_a_finished_stage_keeps_no_resumable_state(tmp_path: Path) -> None:
    states = StateFolder(tmp_path / "dalle")
    states.save({"step": 5})
    states.finish({"steps": 5})
    assert states.finished and not states.started
    assert states.summary() == {"steps": 5}
    assert not list(states.folder.glob("*.pt"))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_state_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    states = StateFolder(tmp_path / "vae")
    states.save({"step": 5, "weights": torch.arange(100.0)})
    path = states.folder / "step-00000005.pt"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    elif damage == "cut":
        path.write_bytes(bytes(data[:-10]))
    else:
        path.unlink()
    with pytest.raises(ValueError, match=r"step-00000005\.pt is (damaged|missing)"):
        states.load()


def test_lines_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for stage, step in (("vae", 20), ("dalle", 10), ("dalle", 20), ("dalle", 30)):
        log.write({"stage": stage, "step": step})
    with log.path.open("a") as file:
        file.write('{"stage": "dalle", "st')  # the process was killed here
    log.rewind("dalle", 20)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("vae", 20), ("dalle", 10), ("dalle", 20)]


def test_other_processes_write_no_metrics(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl", enabled=False).write({"stage": "vae", "step": 1})
    assert not (tmp_path / "metrics.jsonl").exists()
