"""Fitting a run into a wall-clock time: durations, shares, and how many steps a stage can afford.

A stage measures its own speed over its first steps, turns its share of the time into a number of steps and keeps
that number in its state, so that its schedules stay pure functions of the step. It reviews the number where the
learning rate is about to fall: until then the rate has been flat, so a better number changes no step that is already
done. Later reviews only ever shorten a stage that has become too slow for its time.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dalle_mini_impl.config import StageConfig

WARMUP_STEPS = 5
"""First steps that are not timed: memory is allocated and kernels are chosen in them."""
TIMED_STEPS = 20
"""Steps that a stage measures its speed by, before it fixes the number of steps and before it puts that right."""
EVALUATION_SHARE = 0.15
"""A stage spends at most this share of its time on evaluations; it makes fewer where they are dear."""
REVIEWS = (0.0, 0.5, 0.75, 0.9)
"""When the number of steps is reviewed, as shares of the falling part of the learning rate."""
OVERRUN_LIMIT = 1.1
"""A stage that has used this multiple of its time stops where it is."""
RESERVE_SHARE = 0.01
"""Share of a run's time that is kept for writing the last checkpoint."""

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def parse_duration(text: str) -> float:
    """Seconds in a duration such as 90s, 25m, 1h30m or 1.5h; raises ValueError for anything else."""
    match = _DURATION.fullmatch(text.strip().lower())
    if not match or not any(match.groups()):
        raise ValueError(f"{text!r} is no duration; write it like 90s, 25m or 1h30m")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    duration_sec = hours * 3600 + minutes * 60 + seconds
    if duration_sec <= 0:
        raise ValueError(f"{text!r} is no time at all; write it like 90s, 25m or 1h30m")
    return duration_sec


def format_duration(duration_sec: float) -> str:
    """A duration for people: 42s, 3m05s, 1h30m."""
    seconds = round(duration_sec)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}m{seconds:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def process_age_sec() -> float:
    """Seconds since this process was started; since the first call where the system doesn't tell."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        uptime_sec = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        return max(0.0, uptime_sec - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


class Budget:
    """What is left of a run's wall-clock time.

    total_sec: None means no limit. clock: seconds, monotonic. already_sec: used before this object was made.
    """

    def __init__(
        self, total_sec: float | None, *, already_sec: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total_sec = total_sec
        self.clock = clock
        self._start = clock() - already_sec

    def count(self, used_sec: float) -> None:
        """Counts time that an earlier process used."""
        self._start -= used_sec

    def elapsed_sec(self) -> float:
        """Seconds used so far."""
        return self.clock() - self._start

    def is_used_up(self) -> bool:
        """Whether nothing is left of it."""
        return self.total_sec is not None and self.elapsed_sec() >= self.total_sec

    def for_stage(self, stage: str, remaining: Sequence[str], shares: Mapping[str, float]) -> float | None:
        """Seconds for a stage: its share, among the stages that remain (itself included), of the time that remains."""
        if self.total_sec is None:
            return None
        left_sec = max(0.0, self.total_sec * (1 - RESERVE_SHARE) - self.elapsed_sec())
        return left_sec * shares[stage] / sum(shares[name] for name in remaining)


@dataclass
class Plan:
    """How long a stage runs. total_steps is None while a budgeted stage still measures its speed."""

    total_steps: int | None
    num_evaluations: int
    allotted_sec: float | None = None
    step_sec: float | None = None
    evaluation_sec: float | None = None
    num_reviews: int = 0
    last_evaluation: int = 0

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows once `step` steps are done: evenly spread, the last at the end.

        One that would come right after another (the trial, or where the plan was put right) is left out, and so is
        one that has been made.
        """
        total = self.total_steps
        if total is None or step == self.last_evaluation:
            return False
        done, before = (n * self.num_evaluations // total for n in (step, step - 1))
        soon = 2 * self.num_evaluations * (step - self.last_evaluation) < total
        return done > before and (not soon or step == total)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the resumable state."""
        return asdict(self)


class StageClock:
    """Times a stage's steps and evaluations and keeps its plan.

    A stage without a budget has its plan from the start. One with a budget asks for a trial evaluation once
    WARMUP_STEPS + TIMED_STEPS steps are done (`wants_measurement`) and then fixes its plan (`fix`).
    unlike_steps: first steps that are not timed besides those of the warm-up.
    """

    def __init__(
        self,
        config: StageConfig,
        allotted_sec: float | None,
        clock: Callable[[], float] = time.monotonic,
        unlike_steps: int = 0,
    ) -> None:
        self.config = config
        self.clock = clock
        self.start = clock()
        self.plan = Plan(None if allotted_sec is not None else config.steps, config.evaluations, allotted_sec)
        self._steps_done = -unlike_steps
        self._timed_steps = 0
        self._timed_sec = 0.0
        self._step_start = self.start

    def go_on(self, trained_sec: float, plan: Plan | None, *, has_new_time: bool = False) -> None:
        """Takes up a stage that has been trained for so long, under its own plan if it had one.

        has_new_time: what is allotted now comes on top of what has been trained, and the stage measures its speed anew.
        """
        self.start -= trained_sec
        if has_new_time and self.plan.allotted_sec is not None:
            self.plan.allotted_sec += trained_sec
        elif plan is not None:
            self.plan = plan

    def step_started(self) -> None:
        """Call before a step's batch is asked for."""
        self._step_start = self.clock()

    def step_done(self) -> None:
        """Call when a step's work is finished (on a GPU: queued; the measurement ends with a synchronisation)."""
        self._steps_done += 1
        if self._steps_done > WARMUP_STEPS:
            self._timed_steps += 1
            self._timed_sec += self.clock() - self._step_start

    @property
    def elapsed_sec(self) -> float:
        """Seconds since the stage began in this process."""
        return self.clock() - self.start

    def wants_measurement(self) -> bool:
        """Whether enough steps have been timed to fix the number of steps."""
        return self.plan.total_steps is None and self._timed_steps >= TIMED_STEPS

    def wants_review(self, step: int) -> bool:
        """Whether it is time to look at the number of steps again, and as many are timed as it was first fixed by."""
        plan = self.plan
        if plan.allotted_sec is None or plan.total_steps is None or plan.num_reviews >= len(REVIEWS):
            return False
        fallen = REVIEWS[plan.num_reviews] * self.config.decay_share
        return step >= (1 - self.config.decay_share + fallen) * plan.total_steps and self._timed_steps >= TIMED_STEPS

    def fix(self, step: int, evaluation_sec: float) -> None:
        """Fixes the plan once `step` steps are done and evaluated, which is known to take evaluation_sec.

        Where no time is left for another step and its evaluation, the stage ends there.
        """
        assert self.plan.allotted_sec is not None
        evaluations = self.config.evaluations
        if evaluation_sec > 0:
            affordable = int(EVALUATION_SHARE * self.plan.allotted_sec / evaluation_sec)
            evaluations = max(1, min(evaluations, affordable))
        self.plan.num_evaluations = evaluations
        self.plan.evaluation_sec = evaluation_sec
        self._set_total(step, evaluations, fewest=0)

    def review(self, step: int) -> bool:
        """Puts the number of steps right with the speed measured since the last look; True where that changed it."""
        plan = self.plan
        assert plan.total_steps is not None
        before = plan.total_steps
        done = step * plan.num_evaluations // before
        self._set_total(step, max(1, plan.num_evaluations - done), fewest=1)
        if plan.num_reviews > 0:
            plan.total_steps = min(plan.total_steps, before)
        plan.num_reviews += 1
        return plan.total_steps != before

    def overrun(self) -> bool:
        """Whether the stage has used far more than its time and has to stop where it is."""
        allotted = self.plan.allotted_sec
        return allotted is not None and self.elapsed_sec > allotted * OVERRUN_LIMIT + 5.0

    def _set_total(self, step: int, evaluations_left: int, fewest: int) -> None:
        plan = self.plan
        assert plan.allotted_sec is not None
        plan.step_sec = max(self._timed_sec / max(1, self._timed_steps), 1e-6)
        left_sec = plan.allotted_sec - self.elapsed_sec - evaluations_left * (plan.evaluation_sec or 0.0)
        plan.total_steps = step + max(fewest, int(left_sec / plan.step_sec))
        self._timed_steps, self._timed_sec = 0, 0.0
