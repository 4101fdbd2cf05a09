"""The log says which share of the time steps have waited for their data.

Time is made up here: making a batch and computing its loss take as long as a test says.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from rich.console import Console

from dalle_mini_impl.config import StageConfig
from dalle_mini_impl.training import loop, progress
from dalle_mini_impl.training.batches import Batch
from dalle_mini_impl.training.checkpoint import StateFolder
from dalle_mini_impl.training.progress import MetricsLog, Reporter
from tests.test_training_tasks import vae_task


class _Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def taking(self, seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work` as something that takes so many seconds."""

        def slow(*given: Any) -> Any:
            self.now += seconds
            return work(*given)

        return slow


class _NoPrefetcher:
    """Makes each batch when it is asked for, so that making and waiting take the same time."""

    def __init__(self, make: Callable[[int], Batch], pin_memory: bool = False) -> None:
        self.get = make

    def close(self) -> None:
        pass


def _shares(batch_sec: float, step_sec: float, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the log's lines say of 25 steps."""
    clock, task = _Clock(), vae_task()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=clock.monotonic))
    monkeypatch.setattr(loop, "Prefetcher", _NoPrefetcher)
    monkeypatch.setattr(task, "batch", clock.taking(batch_sec, task.batch))
    monkeypatch.setattr(task, "loss", clock.taking(step_sec, task.loss))
    monkeypatch.setattr(task, "evaluate", clock.taking(1000.0, task.evaluate))
    config = StageConfig.model_validate({"steps": 25, "batch_size": 4, "evaluations": 2, "precision": "fp32"})
    log = MetricsLog(out / "metrics.jsonl")
    state = StateFolder(out / "state")
    accelerator = Accelerator(cpu=True)
    trainer = loop.StageTrainer(
        task, config, accelerator=accelerator, seed=0, state=state, log=log, samples=out / "samples"
    )
    assert trainer.run()
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    trained = [line for line in lines if "evaluation" not in line]
    assert [line["step"] for line in trained] == [1, 10, 20, 25]
    return [line["data_wait_share"] for line in trained]


def test_slow_batches_are_most_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _shares(9.0, 1.0, tmp_path, monkeypatch) == pytest.approx([0.9] * 4)


def test_fast_batches_are_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _shares(0.001, 1.0, tmp_path, monkeypatch) == pytest.approx([0.001] * 4, abs=1e-4)


def test_a_person_is_told_only_of_waits_that_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(progress.logger, "info", lambda text, *given: said.append(text % given))
    for share in (0.3, 0.01):
        reporter = Reporter("vae", "pictures", console=Console(file=io.StringIO()))
        reporter.numbers(10, 20, "loss 1.000", 50.0, 60.0, share)
    assert said == [
        "vae 10/20  loss 1.000, 50 pictures/s (30% of the time waiting for data), 1m00s left",
        "vae 10/20  loss 1.000, 50 pictures/s, 1m00s left",
    ]
