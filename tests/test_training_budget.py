"""Fitting a run into a wall-clock time, with a clock that only moves when told to."""

from __future__ import annotations

import pytest

from dalle_mini_impl.config import StageConfig
from dalle_mini_impl.training.budget import (
    TIMED_STEPS,
    WARMUP_STEPS,
    Budget,
    StageClock,
    format_duration,
    parse_duration,
    process_age_sec,
)


class FakeClock:
    """Seconds that pass when `wait` is called."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("25m", 1500), ("1h30m", 5400), ("1.5h", 5400), ("2H", 7200)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "25", "m", "1d", "25 minutes", "-5m", "0s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write it like 90s, 25m or 1h30m"):
        parse_duration(text)


def test_durations_for_people() -> None:
    assert [format_duration(value) for value in (42.4, 185, 5400)] == ["42s", "3m05s", "1h30m"]


def test_time_that_a_stage_leaves_flows_on() -> None:
    clock = FakeClock()
    budget = Budget(100.0, already_sec=10.0, clock=clock)
    shares = {"vae": 1.0, "clip": 1.0, "dalle": 2.0}
    assert budget.for_stage("vae", ["vae", "clip", "dalle"], shares) == pytest.approx(89 / 4)  # 1 % is kept back
    clock.wait(10.0)
    assert budget.for_stage("clip", ["clip", "dalle"], shares) == pytest.approx(79 / 3)
    clock.wait(200.0)
    assert budget.for_stage("dalle", ["dalle"], shares) == 0.0
    assert Budget(None).for_stage("dalle", ["dalle"], shares) is None


def run_steps(stage: StageClock, clock: FakeClock, steps: int, step_sec: float) -> None:
    for _ in range(steps):
        stage.step_started()
        clock.wait(step_sec)
        stage.step_done()


def test_a_stage_turns_its_time_into_steps_and_fills_it() -> None:
    clock = FakeClock()
    stage = StageClock(StageConfig(evaluations=4), 100.0, clock)
    assert stage.plan.total_steps is None
    run_steps(stage, clock, WARMUP_STEPS, 3.0)  # slow first steps must not count
    run_steps(stage, clock, TIMED_STEPS, 0.1)
    assert stage.wants_measurement()
    clock.wait(1.0)
    step = WARMUP_STEPS + TIMED_STEPS
    stage.fix(step, evaluation_sec=1.0)
    assert not stage.wants_measurement()
    assert stage.plan.step_sec == pytest.approx(0.1)
    left_sec = 100 - (WARMUP_STEPS * 3 + TIMED_STEPS * 0.1 + 1) - 4
    assert stage.plan.total_steps == pytest.approx(step + left_sec / 0.1, abs=1)


@pytest.mark.parametrize("evaluation_sec", [45.0, 90.0, 200.0])
def test_a_stage_without_time_for_another_evaluation_ends_with_its_first(evaluation_sec: float) -> None:
    """It went on for a single step and evaluated that, too: a minute of 85 seconds."""
    clock = FakeClock()
    stage = StageClock(StageConfig(), 60.0, clock)
    step = WARMUP_STEPS + TIMED_STEPS
    run_steps(stage, clock, step, 0.2)
    clock.wait(evaluation_sec)
    stage.fix(step, evaluation_sec)
    assert stage.plan.total_steps == step and not stage.wants_measurement()


def test_dear_evaluations_become_fewer() -> None:
    clock = FakeClock()
    stage = StageClock(StageConfig(evaluations=10), 100.0, clock)
    run_steps(stage, clock, WARMUP_STEPS + TIMED_STEPS, 0.01)
    stage.fix(WARMUP_STEPS + TIMED_STEPS, evaluation_sec=5.0)
    assert stage.plan.num_evaluations == 3  # 15 % of 100 s


def test_the_plan_is_put_right_before_the_rate_falls_and_only_shortened_after() -> None:
    clock = FakeClock()
    stage = StageClock(StageConfig(evaluations=1, decay_share=0.5), 100.0, clock)
    run_steps(stage, clock, WARMUP_STEPS + TIMED_STEPS, 0.1)
    stage.fix(25, evaluation_sec=0.0)
    assert stage.plan.total_steps == pytest.approx(1000, abs=1)
    assert not stage.wants_review(499)
    run_steps(stage, clock, 475, 0.05)  # the machine became faster
    assert stage.wants_review(500) and stage.review(500)
    longer = stage.plan.total_steps
    assert longer == pytest.approx(500 + (100 - 2.5 - 475 * 0.05) / 0.05, abs=1)
    assert not stage.wants_review(longer // 2 + 10)
    run_steps(stage, clock, longer * 3 // 4 - 500, 0.01)  # faster still: a falling rate is not drawn out
    step = longer * 3 // 4 + 1
    assert stage.wants_review(step) and not stage.review(step)
    run_steps(stage, clock, 300, 0.2)  # far slower
    step = longer * 7 // 8 + 1
    assert stage.wants_review(step) and stage.review(step)
    assert stage.plan.total_steps is not None and step < stage.plan.total_steps < longer


def test_a_slow_machine_does_not_make_a_stage_late() -> None:
    clock = FakeClock()
    stage = StageClock(StageConfig(evaluations=1, decay_share=0.5), 100.0, clock)
    step = 0
    while stage.plan.total_steps is None or step < stage.plan.total_steps:
        run_steps(stage, clock, 1, 0.1 + 0.0003 * step)  # slower and slower
        step += 1
        if stage.wants_measurement():
            stage.fix(step, 0.0)
        if stage.wants_review(step):
            stage.review(step)
    assert 90 < stage.elapsed_sec < 104


@pytest.mark.parametrize("is_resumed", [False, True])
def test_one_slow_step_does_not_shorten_a_stage(is_resumed: bool) -> None:
    """A rate that falls from the start, and a stage gone on with, had their plan put right by a single step."""
    clock = FakeClock()
    config = StageConfig(evaluations=1, decay_share=0.5 if is_resumed else 1.0)
    stage = StageClock(config, 100.0, clock)
    step = WARMUP_STEPS + TIMED_STEPS
    run_steps(stage, clock, step, 0.1)
    stage.fix(step, evaluation_sec=0.0)
    if is_resumed:
        run_steps(stage, clock, 470, 0.1)
        plan, step = stage.plan, 495
        stage = StageClock(config, 100.0, clock)
        stage.go_on(49.5, plan)
        run_steps(stage, clock, WARMUP_STEPS, 0.1)
        step += WARMUP_STEPS
    while stage.plan.num_reviews == 0:
        run_steps(stage, clock, 1, 0.5 if stage._timed_steps == 0 else 0.1)
        step += 1
        if stage.wants_review(step):
            stage.review(step)
    assert stage.plan.total_steps is not None and stage.plan.total_steps > 800, "of 1,000"


def test_evaluations_are_spread_evenly_and_the_last_is_at_the_end() -> None:
    plan = StageClock(StageConfig(steps=10, evaluations=3), None).plan
    assert [step for step in range(11) if plan.evaluates_after(step)] == [4, 7, 10]
    plan.last_evaluation = 3
    assert not plan.evaluates_after(4)


def test_without_a_budget_the_recipe_says_how_many_steps() -> None:
    stage = StageClock(StageConfig(steps=7), None)
    assert stage.plan.total_steps == 7
    assert not (stage.wants_measurement() or stage.wants_review(7) or stage.overrun())


def test_a_stage_that_overruns_is_told_to_stop() -> None:
    clock = FakeClock()
    stage = StageClock(StageConfig(), 100.0, clock)
    clock.wait(112.0)
    assert not stage.overrun()
    clock.wait(5.0)
    assert stage.overrun()


def test_the_age_of_this_process_is_plausible() -> None:
    assert 0 <= process_age_sec() < 24 * 3600
