"""Trackers get what metrics.jsonl and samples/ get, at steps that go on from stage to stage and after --resume."""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from dalle_mini_impl.config import Recipe
from dalle_mini_impl.training import loop, tracking
from dalle_mini_impl.training.run import train
from dalle_mini_impl.training.stages import ORDER
from tests.test_cli_train import run
from tests.tiny import tiny_recipe

DATA = "shapes:count=60"


def recipe(*overrides: str, steps: int = 4) -> Recipe:
    settings = ("batch_size=8", "evaluations=2", "warmup_steps=2", "precision=fp32", f"steps={steps}")
    return tiny_recipe(*(f"train.{stage}.{setting}" for stage in ORDER for setting in settings), *overrides)


class Recorder(GeneralTracker):
    """Remembers what it is told."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.config: dict[str, Any] = {}
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[int, str, tuple[int, int]]] = []

    @property
    def tracker(self) -> list[str]:
        return self.calls

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.metrics.append((step, values))

    def log_images(self, values: dict[str, list[Image.Image]], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.pictures += [(step, name, images[0].size) for name, images in values.items()]

    def finish(self) -> None:
        self.calls.append("finish")


def assert_all_lines(metrics: list[tuple[int, dict[str, float]]], out: Path) -> None:
    """What a tracker was told are the numbers of metrics.jsonl, at the run's steps."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == len(lines)
    for line, (step, values) in zip(lines, metrics, strict=True):
        stage, part = line["stage"], "validation" if line.get("evaluation") else "train"
        assert step == 4 * ORDER.index(stage) + line["step"]
        expected = {f"{stage}/{part}/{k}": v for k, v in line.items() if k not in ("stage", "step", "evaluation")}
        assert values == expected | {f"{stage}/step": line["step"]}


def test_a_tracker_gets_every_number_and_every_sheet(tmp_path: Path) -> None:
    recorder, out = Recorder(), tmp_path / "mine"
    accelerator = Accelerator(cpu=True, log_with=[recorder])
    assert train(recipe(), DATA, out, accelerator=accelerator)
    accelerator.end_training()
    assert recorder.calls == ["start", "finish"]
    assert recorder.config["dalle.dim"] == 32 and recorder.config["data.views"] == "['plain']"
    assert_all_lines(recorder.metrics, out)
    steps = [step for step, _ in recorder.metrics]
    assert steps == sorted(steps) and steps[-1] == 12
    assert {"clip/validation/loss_chance", "dalle/train/tokens_per_sec", "vae/validation/psnr"} <= {
        name for _, values in recorder.metrics for name in values
    }
    assert [(step, name) for step, name, _ in recorder.pictures] == [
        (2, "vae/sheet"),
        (4, "vae/sheet"),
        (10, "dalle/sheet"),
        (12, "dalle/sheet"),
    ]
    with Image.open(out / "samples" / "dalle-000004.png") as sheet:
        assert recorder.pictures[-1][2] == sheet.size


class Service(ModuleType):
    """As much of the packages wandb and trackio as Accelerate's trackers and ours use; remembers what it is told.

    A run that is started anew begins with an empty configuration, as trackio's do.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, origin="made by a test")
        self.runs: list[dict[str, Any]] = []
        self.configs: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def init(self, **settings: Any) -> Service:
        self.runs.append(settings)
        self.configs.append({})
        self.config = SimpleNamespace(update=lambda values, allow_val_change: self.configs[-1].update(values))
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    @staticmethod
    def Image(picture: str | Image.Image) -> tuple[int, int]:
        """wandb's takes a picture, trackio's a path; here the size is enough."""
        if isinstance(picture, str):
            with Image.open(picture) as opened:
                return opened.size
        return picture.size


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_get_the_recipe_and_every_number_and_sheet_at_each_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    service, out = Service(name), tmp_path / "mine"
    monkeypatch.setitem(sys.modules, name, service)
    for stages in (["vae", "clip"], ["dalle"]):
        assert train(recipe(), DATA, out, stages=stages, track=[name])  # type: ignore[arg-type]
    identity = json.loads((out / "run.json").read_text())["tracking_id"]
    known = {"name": "mine", "id": identity, "dir": str(out)} if name == "wandb" else {"name": f"mine-{identity}"}
    assert service.runs == [{"project": "dalle-mini", "resume": "allow", **known}] * 2, "one run, started twice"
    assert service.configs == [tracking.flatten(recipe().model_dump(mode="json"))] * 2
    metrics = [(step, values) for step, values in service.logged if not any("sheet" in key for key in values)]
    assert_all_lines(metrics, out)
    sheets = {step: values for step, values in service.logged if any("sheet" in key for key in values)}
    for step, path in ((4, "vae-000004.png"), (12, "dalle-000004.png")):
        with Image.open(out / "samples" / path) as sheet:
            assert list(sheets[step].values()) == ([[sheet.size]] if name == "wandb" else [sheet.size])
    assert sheets.keys() == {2, 4, 10, 12}


def test_tensorboard_reads_back_what_a_killed_and_resumed_run_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "mine"
    original, count = loop.StageTrainer._one_step, 0

    def one_step(self: loop.StageTrainer, prefetcher: Any) -> None:
        nonlocal count
        count += 1
        if count == 6:  # the second of CLIP's
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, prefetcher)

    with monkeypatch.context() as patch:
        patch.setattr(loop.StageTrainer, "_one_step", one_step)
        assert train(recipe(), DATA, out, track=["tensorboard"]) is False
    assert train(recipe(), DATA, out, track=["tensorboard"], resume=True)
    events = event_accumulator.EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for stage, part, name in (
        ("vae", "train", "loss"),
        ("clip", "validation", "loss"),
        ("dalle", "train", "image_nll"),
    ):
        logged = [(event.step, event.value) for event in events.Scalars(f"{stage}/{part}/{name}")]
        before = 4 * ORDER.index(stage)
        of_stage = [line for line in lines if line["stage"] == stage and ("evaluation" in line) == (part != "train")]
        assert [step for step, _ in logged] == [before + line["step"] for line in of_stage]
        assert [value for _, value in logged] == pytest.approx([line[name] for line in of_stage], rel=1e-5)
    assert [event.step for event in events.Images("vae/sheet")] == [2, 4]
    with Image.open(out / "samples" / "vae-000004.png") as sheet:
        image = events.Images("vae/sheet")[-1]
        assert (image.width, image.height) == sheet.size
    identity = json.loads((out / "run.json").read_text())["tracking_id"]
    assert len(identity) == 8, "a resumed run is the same run to its trackers"


def test_what_was_logged_after_the_last_save_of_a_killed_run_is_hidden(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first_step, value in ((0, 1.0), (3, 2.0)):
        (tracker,) = tracking.build_trackers(["tensorboard"], tmp_path, "id", first_step)
        tracker.start()
        for step in range(first_step + 1, 7):
            tracker.log({"vae/train/loss": value}, step=step)
        tracker.finish()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("vae/train/loss")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in scalars] == [1, 1, 1, 2, 2, 2]


def test_a_tracker_that_isnt_installed_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: ModuleSpec(name, None) if name == "wandb" else None)
    out = tmp_path / "run"
    command = ["--data", DATA, "--out", str(out)]
    assert run(*command, "--track", "trackio", "--track", "wandb") == 2
    error = capfd.readouterr().err
    assert "error: tracking with trackio and wandb needs: pip install trackio wandb" in error
    assert "Traceback" not in error and not out.exists()
    with pytest.raises(ValueError, match="there is no tracker nobody; there are tensorboard, wandb, trackio"):
        train(recipe(), DATA, out, track=["nobody"])


def test_a_tracker_that_doesnt_start_is_told_before_anything_is_made(tmp_path: Path) -> None:
    class Locked(Recorder):
        name = "locked"

        def start(self) -> None:
            raise RuntimeError("log in first")

    accelerator = Accelerator(cpu=True, log_with=[Locked()])
    with pytest.raises(ValueError, match=r"tracking \(locked\) can't start: log in first; leave out --track"):
        train(recipe(), DATA, tmp_path / "run", accelerator=accelerator)
    accelerator.end_training()
    assert not (tmp_path / "run").exists()


def test_other_processes_log_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    accelerator = Accelerator(cpu=True, log_with=[recorder])
    accelerator.init_trackers("project")
    sheet = tmp_path / "sheet.png"
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(sheet)
    told = tracking.Tracking(accelerator)
    monkeypatch.setattr(type(accelerator), "is_main_process", property(lambda self: False))
    told.log_sheet("vae", 1, sheet)
    log = loop.MetricsLog(tmp_path / "metrics.jsonl", enabled=False, tracking=told)
    log.write({"stage": "vae", "step": 1, "loss": 1.0})
    log.sheet("vae", 1, sheet)
    assert recorder.metrics == [] and recorder.pictures == []
