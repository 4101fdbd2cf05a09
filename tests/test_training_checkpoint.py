"""The newest states are kept whole; damaged ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dalle_mini_impl.training import checkpoint
from dalle_mini_impl.training.checkpoint import KEPT_STATES, StateFolder
from dalle_mini_impl.training.progress import MetricsLog, read_metrics
from dalle_mini_impl.weights import save_weights


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


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["step-00000010.pt", "best-00000010.safetensors"])
def test_a_damaged_state_gives_way_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    states = StateFolder(tmp_path / "vae")
    for step in (5, 10):
        best = states.best_name(step)
        states.save_best(best, {"weights": torch.full((50,), float(step))})
        states.save({"step": step, "best": 1.0, "best_file": best})
    flip(states.folder / name)
    again = StateFolder(states.folder)
    with caplog.at_level("WARNING", logger="dalle_mini_impl.training"):
        state = again.load()
    assert state["step"] == 5 and name in caplog.text and "goes on from step 5" in caplog.text
    assert torch.equal(again.load_best(state["best_file"])["weights"], torch.full((50,), 5.0))
    again.save({"step": 12, "best": 1.0, "best_file": state["best_file"]})
    left = sorted(path.name for path in states.folder.iterdir())
    assert left == ["best-00000005.safetensors", "index.json", "step-00000005.pt", "step-00000012.pt"]


def test_a_second_state_of_a_step_does_not_take_the_place_of_the_first_before_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    states = StateFolder(tmp_path)
    states.save({"step": 5, "value": "first"})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "write_json", killed)
        states.save({"step": 5, "value": "second"})
    assert states.load()["value"] == "first" and not caplog.records
    for value in ("second", "third", "fourth"):
        states.save({"step": 5, "value": value})
        assert states.load()["value"] == value
    assert len(list(tmp_path.glob("*.pt"))) == 2


def test_where_no_state_is_whole_all_are_named(tmp_path: Path) -> None:
    states = StateFolder(tmp_path / "vae")
    for step in (5, 10):
        states.save({"step": step, "weights": torch.arange(100.0)})
        flip(states.folder / f"step-{step:08d}.pt")
    with pytest.raises(ValueError, match=r"00000010\.pt is damaged.*00000005\.pt is damaged.*delete .*vae to start"):
        StateFolder(states.folder).load()
    states.index_path.write_text("[{")
    with pytest.raises(ValueError, match=r"index\.json is damaged .*delete .*vae to start the stage over"):
        StateFolder(states.folder).load()


def test_what_a_killed_save_leaves_is_swept_up(tmp_path: Path) -> None:
    states = StateFolder(tmp_path / "vae")
    states.folder.mkdir()
    (states.folder / ".step-00000004.pt.4194304.tmp").write_bytes(b"half")  # no process has so high a number
    (states.folder / ".index.json.4194304.tmp").write_bytes(b"half")
    states.save({"step": 5})
    assert sorted(path.name for path in states.folder.iterdir()) == ["index.json", "step-00000005.pt"]


def test_a_state_of_an_earlier_version_is_gone_on_with(tmp_path: Path) -> None:
    states = StateFolder(tmp_path / "vae")
    save_weights(states.folder / "best.safetensors", {"a": torch.ones(2)})
    states.save({"step": 5, "best": 1.0})
    state = StateFolder(states.folder).load()
    assert state["best_file"] == "best.safetensors"


@pytest.mark.parametrize("text", ['[{"file": "step-00000005.pt", "step": 5}]', "[]", '[{"filf": "a"}]'])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    states = StateFolder(tmp_path / "vae")
    states.save({"step": 5})
    states.index_path.write_text(text)
    with pytest.raises(ValueError, match=rf"{states.index_path} is damaged .*; delete {states.folder} to start"):
        StateFolder(states.folder).load()


def test_lines_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for stage, step in (("vae", 20), ("dalle", 10), ("dalle", 20), ("dalle", 30)):
        log.write({"stage": stage, "step": step})
    with log.path.open("a") as file:
        file.write('{"stage": "dalle", "st')  # the process was killed here
    log.rewind("dalle", 20)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("vae", 20), ("dalle", 10), ("dalle", 20)]


def test_the_evaluation_of_the_resumed_step_is_dropped_where_it_is_made_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    lines = [
        {"stage": "vae", "step": 20, "time_sec": 1.0, "evaluation": True},
        {"stage": "dalle", "step": 10, "time_sec": 1.0, "evaluation": True},
        {"stage": "dalle", "step": 20, "time_sec": 2.0},
        {"stage": "dalle", "step": 20, "time_sec": 2.0, "evaluation": True},
    ]
    for line in lines:
        log.write(line)
    log.rewind("dalle", 20)
    assert read_metrics(log.path) == lines
    log.rewind("dalle", 20, evaluates=True)
    assert read_metrics(log.path) == lines[:3]


def test_other_processes_write_no_metrics(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl", enabled=False).write({"stage": "vae", "step": 1})
    assert not (tmp_path / "metrics.jsonl").exists()
