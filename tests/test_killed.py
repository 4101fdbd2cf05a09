"""Killed anywhere, in every stage, on one process and on two, a run goes on to the same losses and weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.training.checkpoint import StateFolder
from tests.processes import steps_done, train_in_processes
from tests.tiny import TIMED, tiny_recipe

DATA = "shapes:count=60"
KILLED, STOPPED, INTERRUPTED = -9, 3, 4


def recipe(*overrides: str) -> Recipe:
    """Four steps a stage, an evaluation after every second one; vq starts to quantize at once."""
    settings = ["steps=4", "batch_size=8", "evaluations=2", "warmup_steps=2", "precision=fp32"]
    stages = [f"train.{stage}.{setting}" for stage in get_args(Stage) for setting in settings]
    return tiny_recipe(
        'data.views=["plain", "flip"]',
        "vae.quantize_after=0",
        "dalle.dropout=0.1",
        'dalle.look_ahead=["below"]',
        "dalle.code_features=true",
        *stages,
        *overrides,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process trains in one go."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train_in_processes(recipe(), DATA, out) == [0]
    return out


def facts(out: Path) -> tuple[list[dict[str, Any]], dict[str, dict[str, torch.Tensor]]]:
    """All lines of metrics.jsonl but for what the machine's speed decides, and all weights."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in TIMED} for line in lines]
    return metrics, {path.stem: load_file(path) for path in (out / "checkpoint").glob("*.safetensors")}


def assert_same(out: Path, other: Path) -> None:
    (metrics, weights), (expected_metrics, expected) = facts(out), facts(other)
    assert metrics == expected_metrics
    assert weights.keys() == expected.keys()
    for model, tensors in weights.items():
        assert tensors.keys() == expected[model].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[model][name]), f"{model}: {name}"


POINTS = (
    "pictures checkpoint step:1 step:3 state:1 index:1 best:1 checkpoint:1 finish:1 encoding next-stage:1 optimizer:2 "
    "state:2 finish:1 step:2 best:2 index:1 finish:1"
).split()
"""Each kill comes after the start that follows the one before; together they go through all stages."""


def test_killed_anywhere_a_run_goes_on_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    for number, point in enumerate(POINTS):
        assert train_in_processes(recipe(), DATA, killed, {0: point}) == [KILLED], (number, point)
    assert train_in_processes(recipe(), DATA, killed) == [0]
    assert_same(killed, whole)
    assert not list(killed.rglob(".*.tmp")) and not list(killed.rglob(".*.partial")), "what was half-written is left"


def test_killed_between_an_evaluation_and_its_state_a_run_makes_it_once_more(whole: Path, tmp_path: Path) -> None:
    """Of the same step there is a state already: the first evaluation of a process comes after a save of its own."""
    killed = tmp_path / "killed"
    for point in ("state:3", "index:1"):
        assert train_in_processes(recipe(), DATA, killed, {0: point}) == [KILLED]
        assert steps_done(killed, "vae") == 2
    assert train_in_processes(recipe(), DATA, killed) == [0]
    assert_same(killed, whole)


POINTS_OF_TWO = (
    "pictures step:2 state:1 optimizer:1 finish encoding best:1 next-stage:2 optimizer:2 step:3 finish"
).split()
"""Those of process 0 and of process 1 take turns: only process 0 writes."""


def test_two_processes_killed_anywhere_go_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train_in_processes(recipe(), DATA, whole, world_size=2) == [0, 0]
    for number, point in enumerate(POINTS_OF_TWO):
        rank = number % 2
        codes = train_in_processes(recipe(), DATA, killed, {rank: point}, world_size=2)
        assert codes[rank] == KILLED, (number, point, codes)
    assert train_in_processes(recipe(), DATA, killed, world_size=2) == [0, 0]
    assert_same(killed, whole)


LATER: tuple[Stage, ...] = ("prior", "dalle", "distill", "vqgan", "upscale")
"""The stages that a recipe has to ask for, and a DALL·E that reads picture embeddings, as a prior needs it."""

KILLS: dict[Stage, str] = {
    "prior": "embedding step:2 finish",
    "dalle": "optimizer:3 finish",
    "distill": "step:2 index:1 finish",
    "vqgan": "optimizer:3 finish",
    "upscale": "pictures:2 state:3",
}
"""Where each stage is killed; after a `finish` the checkpoint holds another DALL·E or VAE than the stage began with."""
WRITING = ("state", "index", "checkpoint", "finish")
"""Places that process 0 alone comes by; elsewhere the last process is the one to be killed."""


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_later_stages_killed_anywhere_go_on_to_the_same_bits(world_size: int, whole: Path, tmp_path: Path) -> None:
    later = recipe(
        "dalle.image_prefix=2",
        "dalle.reading_share=0.25",
        "vqgan.alone_steps=1",
        "vqgan.ramp_steps=2",
        "vqgan.discriminator_width=4",
        "vqgan.discriminator_layers=1",
        "upscale.factor=2",
        "upscale.width=8",
        "upscale.blocks=1",
    )
    expected, killed = (shutil.copytree(whole, tmp_path / name) for name in ("whole", "killed"))
    for out in (expected, killed):
        shutil.rmtree(out / "state" / "dalle")  # it is trained anew, with a prefix
    assert train_in_processes(later, DATA, expected, world_size=world_size, stages=LATER) == [0] * world_size
    for stage, points in KILLS.items():
        for point in points.split():
            rank = 0 if point.startswith(WRITING) else world_size - 1
            codes = train_in_processes(later, DATA, killed, {rank: point}, world_size=world_size, stages=LATER)
            assert codes[rank] == KILLED, (stage, point, codes)
            unfinished = [one for one in LATER if not StateFolder(killed / "state" / one).finished]
            assert unfinished[0] == stage, (stage, point)
    assert train_in_processes(later, DATA, killed, world_size=world_size, stages=LATER) == [0] * world_size
    assert_same(killed, expected)


STOPS = {
    "pictures": [("stop-in-pictures", INTERRUPTED), ("stop-in-step:1", STOPPED)],
    "vae": [("stop-in-evaluation:1", STOPPED), ("stop-in-checkpoint:1", STOPPED)],
    "clip": [("stop-in-encoding", INTERRUPTED), ("stop-in-step:2", STOPPED), ("stop-in-evaluation:1", STOPPED)],
    "dalle": [("stop-in-step:3", STOPPED)],
}


def test_told_to_stop_anywhere_a_run_ends_well_and_goes_on_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    for place, stops in STOPS.items():
        for point, expected in stops:
            assert train_in_processes(recipe(), DATA, stopped, {0: point}) == [expected], (place, point)
    assert train_in_processes(recipe(), DATA, stopped) == [0]
    assert_same(stopped, whole)


def test_one_of_two_processes_told_to_stop_takes_the_other_along(tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = {0: "stop-soon-in-pictures", 1: "stop-soon-waiting"}
    assert train_in_processes(recipe(), DATA, out, both, world_size=2) == [INTERRUPTED, INTERRUPTED]
    assert train_in_processes(recipe(), DATA, out, {1: "stop-in-step:3"}, world_size=2) == [STOPPED, STOPPED]
    assert steps_done(out, "vae") == 3, "the step was finished and saved, no matter when metrics are due"
    assert train_in_processes(recipe(), DATA, out, {0: "stop-in-checkpoint"}, world_size=2) == [STOPPED, STOPPED]
    assert steps_done(out, "clip") == 0


def test_two_processes_find_a_micro_batch_that_fits_both(tmp_path: Path) -> None:
    small, found, stopped = tmp_path / "small", tmp_path / "found", tmp_path / "stopped"
    ones = recipe("train.vae.micro_batch_size=1")
    assert train_in_processes(ones, DATA, small, world_size=2, stages=["vae"]) == [0, 0]
    codes = train_in_processes(recipe(), DATA, found, {1: "memory:1"}, world_size=2, stages=["vae"])
    assert codes == [0, 0]
    lines = [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]
    assert [line["micro_batch_size"] for line in lines if "micro_batch_size" in line] == [1]
    ours, expected = (load_file(out / "checkpoint" / "vae.safetensors") for out in (found, small))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    codes = train_in_processes(recipe(), DATA, stopped, {1: "memory-in-steps:2"}, world_size=2, stages=["vae"])
    assert codes[1] == 1, "in a step, where they wait for each other, it takes a new start"
    codes = train_in_processes(recipe(), DATA, stopped, {1: "memory-in-steps:2"}, world_size=2, stages=["vae"])
    assert codes == [0, 0]


def test_an_evaluation_that_one_of_two_processes_has_no_memory_for_is_what_they_go_on_with(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert train_in_processes(recipe(), DATA, whole, world_size=2, stages=["vae"]) == [0, 0]
    for _ in range(2):
        codes = train_in_processes(recipe(), DATA, out, {1: "memory-in-evaluation"}, world_size=2, stages=["vae"])
        assert codes[1] == 1
        assert steps_done(out, "vae") == 2, "what was done before the evaluation is kept"
    assert train_in_processes(recipe(), DATA, out, world_size=2, stages=["vae"]) == [0, 0]
    assert_same(out, whole)
