"""What the files of a run say of it, finished or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.training.checkpoint import StateFolder
from dalle_mini_impl.training.progress import read_metrics
from dalle_mini_impl.training.recipes import read_note
from dalle_mini_impl.training.stages import FURTHER, ORDER, asked_for, stage_order

Progress = Literal["finished", "not finished", "not begun", "taken over from --init-from", "not part of this recipe"]


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One stage: its lines of metrics.jsonl, sorted, and the sheets of pictures of its evaluations.

    summary: what was noted when the stage finished, {} before. sheets: (step, PNG), by step.
    """

    stage: Stage
    progress: Progress
    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: Mapping[str, Any]
    sheets: list[tuple[int, Path]]

    @property
    def steps(self) -> int:
        """Steps that are done, as far as the files tell."""
        lines = [*self.training, *self.evaluations]
        return int(self.summary.get("steps", max((line["step"] for line in lines), default=0)))

    @property
    def train_sec(self) -> float:
        """Seconds of training, over all resumes."""
        lines = [*self.training, *self.evaluations]
        return float(self.summary.get("train_sec", max((line.get("time_sec", 0.0) for line in lines), default=0.0)))

    @property
    def skipped_steps(self) -> int:
        """Steps whose gradient was not finite."""
        noted = [line["skipped_steps"] for line in self.training if "skipped_steps" in line]
        return int(self.summary.get("skipped_steps", max(noted, default=0)))

    def curve(self, name: str, part: Literal["training", "evaluations"] = "training") -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was logged."""
        lines = [line for line in getattr(self, part) if isinstance(line.get(name), int | float)]
        return [line["step"] for line in lines], [float(line[name]) for line in lines]

    @property
    def speeds(self) -> tuple[str, tuple[list[int], list[float]]]:
        """What the stage counts, "tokens" or "pictures", and the curve of how many a second it learnt from."""
        of_tokens = self.curve("tokens_per_sec")
        return ("tokens", of_tokens) if of_tokens[0] else ("pictures", self.curve("pictures_per_sec"))

    def last(self, name: str) -> float | None:
        """A metric of the kept weights, else of the last evaluation; None where it was never measured."""
        if name in self.summary:
            return float(self.summary[name])
        _, values = self.curve(name, "evaluations")
        return values[-1] if values else None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run's folder, read."""

    folder: Path
    note: Mapping[str, Any]
    recipe: Recipe
    data_report: Mapping[str, Any] | None
    stages: dict[Stage, StageRecord]

    @property
    def is_finished(self) -> bool:
        """Whether all that the recipe asks for is trained or taken over, and all that has begun is finished."""
        found = {stage.progress for stage in self.stages.values()}
        return "finished" in found and not found & {"not finished", "not begun"}

    def last(self, model: Literal["vae", "clip", "dalle"], name: str) -> float | None:
        """A metric of a model as the checkpoint has it: of what trained it last, where that measured it."""
        for later, trained in FURTHER.items():
            stage = self.stages.get(later) if trained == model else None
            if stage is not None and stage.progress == "finished" and (value := stage.last(name)) is not None:
                return value
        return self.stages[model].last(name)

    @property
    def holds_out(self) -> bool:
        """Whether pictures are held out, as far as is known; where none is, evaluations use training pictures."""
        return self.data_report is None or self.data_report["validation"] > 0


def read_run(folder: Path) -> RunRecord:
    """Reads a run's folder. Raises ValueError where it is none, or of a version whose recipe this one can't read."""
    note_path = folder / "run.json"
    if not note_path.is_file():
        raise ValueError(f"{folder} holds no run (no run.json): give the folder that train.py --out was given")
    note = read_note(note_path, "a report needs the run that it belonged to")
    metrics = folder / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.is_file() else []
    report = folder / "data-report.json"
    recipe = Recipe.parse(note["recipe"], where=f"{note_path}: recipe")
    begun = {line["stage"] for line in lines}
    wanted = asked_for(recipe)
    stages = [stage for stage in stage_order(recipe) if stage in (*ORDER, *wanted, *begun)]

    def before_training(stage: Stage) -> Progress:
        if note.get("init_from") is not None and (folder / "checkpoint" / f"{stage}.safetensors").is_file():
            return "taken over from --init-from"
        return "not begun" if stage in wanted else "not part of this recipe"

    return RunRecord(
        folder=folder,
        note=note,
        recipe=recipe,
        data_report=json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None,
        stages={
            stage: _stage(folder, stage, [line for line in lines if line["stage"] == stage], before_training(stage))
            for stage in stages
        },
    )


def _stage(folder: Path, stage: Stage, lines: list[dict[str, Any]], before_training: Progress) -> StageRecord:
    """A stage by its lines and state; before_training: where it stands if it has neither."""
    lines = sorted(lines, key=lambda line: int(line["step"]))
    state = StateFolder(folder / "state" / stage)
    progress: Progress = "finished" if state.finished else "not finished" if lines or state.started else before_training
    sheets = [(int(path.stem.rpartition("-")[2]), path) for path in (folder / "samples").glob(f"{stage}-[0-9]*.png")]
    return StageRecord(
        stage=stage,
        progress=progress,
        training=[line for line in lines if "evaluation" not in line and "skipped" not in line],
        evaluations=[line for line in lines if "evaluation" in line],
        summary=state.summary() if state.finished else {},
        sheets=sorted(sheets),
    )
