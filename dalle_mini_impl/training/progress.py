"""What a run tells while it goes: metrics.jsonl for programs, a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from accelerate import Accelerator
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text
from torch import Tensor

from dalle_mini_impl.files import naming, write_json_lines
from dalle_mini_impl.training.budget import format_duration

if TYPE_CHECKING:
    from dalle_mini_impl.training.tracking import Tracking

logger = logging.getLogger("dalle_mini_impl.training")

LINE_EVERY_SEC = 20.0
"""Seconds between two plain lines where there is no terminal."""
WORTH_TELLING = 0.05
"""Share of the time that is spent on waiting for data from which a person is told."""


class MetricsLog:
    """`metrics.jsonl`: one object a line, with at least "stage", "step" and "time_sec".

    enabled: False on all processes but the first, where every method does nothing. tracking: gets the same lines.
    """

    def __init__(self, path: Path, enabled: bool = True, tracking: Tracking | None = None) -> None:
        self.path = path
        self.enabled = enabled
        self.tracking = tracking

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends one line."""
        if not self.enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.path), self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
        if self.tracking is not None:
            self.tracking.log(values)

    def sheet(self, stage: str, step: int, path: Path) -> None:
        """Tells that an evaluation may have written a sheet of pictures; files need no word of it, trackers do."""
        if self.enabled and self.tracking is not None and path.is_file():
            self.tracking.log_sheet(stage, step, path)

    def rewind(self, stage: str, step: int, *, evaluates: bool = False) -> None:
        """Drops the lines of a stage after a step, and a half-written last line: they are about to be made again.

        evaluates: so is the step's evaluation.
        """
        if not self.enabled or not self.path.is_file():
            return

        def comes_again(line: Mapping[str, Any]) -> bool:
            is_evaluation_of_step = line["step"] == step and "evaluation" in line
            return line["stage"] == stage and (line["step"] > step or (evaluates and is_evaluation_of_step))

        write_json_lines(self.path, [line for line in read_metrics(self.path) if not comes_again(line)])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; what isn't one, like the last line of a killed run, is left out."""
    return [line for line in map(_parse, path.read_text(encoding="utf-8").splitlines()) if line is not None]


@dataclass
class Running:
    """Sums of metrics since the last line of the log, and the seconds that steps have waited for their data."""

    sums: dict[str, Tensor]
    steps: int = 0
    waited_sec: float = 0.0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Adds one step's metrics, without waiting for the device."""
        for name, value in metrics.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1

    def gathered(self, accelerator: Accelerator) -> dict[str, Any]:
        """The sums of every process, for the resumable state; all of them have to call it."""
        names = sorted(self.sums)
        rows: list[list[float]] = []
        if names:
            own = torch.stack([self.sums[name] for name in names])[None]
            rows = accelerator.gather(own).tolist()
        return {"names": names, "rows": rows, "steps": self.steps}

    @classmethod
    def own_part(cls, state: Mapping[str, Any], accelerator: Accelerator) -> Self:
        """This process's part of what was gathered; nothing where there were more processes, or fewer."""
        if len(state.get("rows", ())) != accelerator.num_processes:
            return cls({})
        row = torch.tensor(state["rows"][accelerator.process_index], dtype=torch.float64, device=accelerator.device)
        return cls(dict(zip(state["names"], row, strict=True)), state["steps"])


def _parse(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) and {"stage", "step"} <= value.keys() else None


class _TwoLines(Progress):
    """A bar, and the numbers on a line of their own, so that narrow terminals show both."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """See `rich.progress.Progress`."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["text"], style="dim")


class Reporter:
    """Shows one stage's progress to a person; a context manager.

    unit: what `rate` counts, for example "tokens". enabled: False on all processes but the first.
    """

    def __init__(self, stage: str, unit: str, enabled: bool = True, console: Console | None = None) -> None:
        self.stage = stage
        self.unit = unit
        self.enabled = enabled
        self.console = console or Console(stderr=True)
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0

    def __enter__(self) -> Self:
        if self.enabled and self.console.is_terminal:
            self._live = _TwoLines(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self.console,
            )
            self._live.start()
            self._task = self._live.add_task(self.stage, total=None, text="measuring")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def step(self, step: int, total: int | None) -> None:
        """Moves the bar."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=step, total=total)

    def numbers(
        self, step: int, total: int | None, text: str, rate: float, left_sec: float | None, data_wait_share: float
    ) -> None:
        """Shows fresh numbers. text: losses as the task words them. rate: units per second."""
        if not self.enabled:
            return
        left = f", {format_duration(left_sec)} left" if left_sec is not None else ""
        waits = f" ({data_wait_share:.0%} of the time waiting for data)" if data_wait_share >= WORTH_TELLING else ""
        text = f"{text}, {rate:,.0f} {self.unit}/s{waits}{left}"
        if self._live is not None and self._task is not None:
            self._live.update(self._task, text=text)
        elif time.monotonic() - self._last_line >= LINE_EVERY_SEC:
            self._last_line = time.monotonic()
            logger.info("%s %d/%s  %s", self.stage, step, total or "?", text)

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.enabled:
            return
        if self._live is not None:
            self._live.console.print(f"[bold]{self.stage}[/bold] {text}", highlight=False, soft_wrap=True)
        else:
            logger.info("%s %s", self.stage, text)


@contextmanager
def counting(label: str, enabled: bool = True) -> Iterator[Callable[[int, int | None], None]]:
    """Shows a count of things done, out of a total where one is known: call the yielded function with both."""
    console = Console(stderr=True)
    if not enabled or not console.is_terminal:
        last = time.monotonic()

        def line(done: int, total: int | None) -> None:
            nonlocal last
            if enabled and time.monotonic() - last >= LINE_EVERY_SEC:
                last = time.monotonic()
                logger.info("%s %d/%s", label, done, total or "?")

        yield line
        return
    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as live:
        task = live.add_task(label, total=None)
        yield lambda done, total: live.update(task, completed=done, total=total)
