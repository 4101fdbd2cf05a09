"""What goes wrong in the middle of a training: numbers, memory, disks; none of it leaves a trace in the weights."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import logging
import math
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dalle_mini_impl.cli.app import run_verb
from dalle_mini_impl.clip import CLIP
from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.prior import Prior
from dalle_mini_impl.training import evaluation, loop
from dalle_mini_impl.training.checkpoint import StateFolder
from dalle_mini_impl.training.run import train
from dalle_mini_impl.training.stages import ORDER
from dalle_mini_impl.training.task import LossModule
from dalle_mini_impl.training.tasks import clip, dalle, vae
from dalle_mini_impl.vae.model import DiscreteVAE
from tests.test_killed import assert_same
from tests.tiny import TIMED, TINY_VALUES, tiny_recipe

DATA = "shapes:count=40"
MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:94] . DefaultCPUAllocator: not enough memory: you tried to"),
]
QUICK = ["steps=4", "batch_size=8", "evaluations=1", "warmup_steps=2", "precision=fp32"]


@pytest.fixture(autouse=True)
def _fresh_log_handlers() -> Iterator[None]:
    """The command writes its log to the standard error of the first test that ran it."""
    logger = logging.getLogger("dalle_mini_impl")
    handlers, logger.handlers = logger.handlers, []
    yield
    logger.handlers = handlers


def recipe(*overrides: str) -> Recipe:
    settings = [f"train.{stage}.{value}" for stage in ORDER for value in QUICK]
    return tiny_recipe("vae.quantize_after=0", *settings, *overrides)


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def command(out: Path, *more: str) -> list[str]:
    """What a person would type for `recipe`."""
    tiny = [f"{section}.{key}={json.dumps(value)}" for section, values in TINY_VALUES.items() if section != "name"
            for key, value in values.items()]  # type: ignore[attr-defined]  # fmt: skip
    quick = [f"train.{stage}.{value}" for stage in ORDER for value in QUICK]
    options = [part for setting in (*tiny, *quick) for part in ("--set", setting)]
    return ["--data", DATA, "--out", str(out), *options, *more]


def run_command(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        run_verb("train", arguments)
    return ended.value.code if isinstance(ended.value.code, int) else 0


def error_line(error: str) -> str:
    assert "Traceback" not in error, error
    (line,) = (line for line in error.splitlines() if line.startswith("error:"))
    return line


def learned(trainer: loop.StageTrainer) -> dict[str, Any]:
    """All that a step may change."""
    state = trainer.state_dict()
    return {key: copy.deepcopy(state[key]) for key in ("model", "ema", "optimizers")}


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        for first, second in zip(one, other, strict=True):
            assert_equal(first, second)
    else:
        assert one == other


def test_a_batch_that_is_not_a_number_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN pixels for the VAE (so that its codebook could learn from them) and CLIP, a NaN loss for DALL·E; one each."""
    poisoned: list[str] = []
    one_step, pixels, loss = loop.StageTrainer._one_step, vae.images_from_pixels, dalle.DALLETask.loss
    is_now = False

    def step(self: loop.StageTrainer, prefetcher: Any) -> None:
        nonlocal is_now
        is_now = self.step == 2
        before = learned(self)
        for group in (group for optimizer in before["optimizers"] for group in optimizer["param_groups"]):
            group.pop("lr")
        one_step(self, prefetcher)
        if is_now:
            after = learned(self)
            for group in (group for optimizer in after["optimizers"] for group in optimizer["param_groups"]):
                group.pop("lr")
            assert_equal(after, before)
            assert (self.skipped, self.skipped_in_a_row) == (1, 1)
            poisoned.append(self.task.stage)
        is_now = False

    def nan_pixels(batch: Tensor) -> Tensor:
        return pixels(batch) * (math.nan if is_now else 1.0)

    def nan_loss(*arguments: Any) -> Any:
        value, parts = loss(*arguments)
        return (value * math.nan if is_now else value), parts

    monkeypatch.setattr(loop.StageTrainer, "_one_step", step)
    for module in (vae, clip):
        monkeypatch.setattr(module, "images_from_pixels", nan_pixels)
    monkeypatch.setattr(dalle.DALLETask, "loss", nan_loss)
    out = tmp_path / "run"
    assert train(recipe(), DATA, out)
    assert poisoned == list(ORDER)
    names = set(PreparedData.open(out / "data").names)
    skipped = [line for line in log(out) if "skipped" in line]
    assert [(line["stage"], line["step"]) for line in skipped] == [(stage, 3) for stage in ORDER]
    assert all(len(line["pictures"]) == 8 and set(line["pictures"]) <= names for line in skipped)
    assert all(line["skipped_steps"] == 1 for line in log(out) if line["step"] == 4 and "skipped_steps" in line)
    for stage in ORDER:
        weights = load_file(out / "checkpoint" / f"{stage}.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_a_loss_that_is_not_finite_ends_the_command_in_one_line_even_where_its_gradient_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    forward = LossModule.forward

    def infinite(self: LossModule, batch: Any, context: Any) -> Any:
        loss, parts = forward(self, batch, context)
        return loss + math.inf, parts

    monkeypatch.setattr(LossModule, "forward", infinite)
    out = tmp_path / "run"
    assert run_command(command(out, "--stage", "vae", "--set", "train.vae.steps=9")) == 1
    line = error_line(capfd.readouterr().err)
    assert "not finite in 5 steps in a row, up to step 5" in line
    assert f"delete {out / 'state' / 'vae'} and start the stage over" in line and "metrics.jsonl" in line
    assert [entry["step"] for entry in log(out)] == [1, 2, 3, 4, 5]


def limited_memory(most: dict[str, int], failed: list[str]) -> Callable[..., Any]:
    """A loss that runs out of memory for micro-batches above a size, in the words of each device."""
    forward = LossModule.forward

    def limited(self: LossModule, batch: Any, context: Any) -> Any:
        stage = self._task.stage
        loss = forward(self, batch, context)  # fails late, when the step has left all that it can leave
        if len(next(iter(batch.values()))) > most[stage]:
            failed.append(stage)
            raise MEMORY_ERRORS[len(failed) % 3]
        return loss

    return limited


def test_where_memory_runs_out_the_same_batch_is_cut_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, found, failed = tmp_path / "small", tmp_path / "found", []
    twos = recipe("dalle.dropout=0.1", *(f"train.{stage}.micro_batch_size=2" for stage in ORDER))
    assert train(twos, DATA, small)
    with monkeypatch.context() as patch:
        patch.setattr(LossModule, "forward", limited_memory(dict.fromkeys(ORDER, 2), failed))
        patch.setattr(loop, "SAVE_EVERY_SEC", 0.0)
        stop_after(patch, "clip", 2)
        assert train(recipe("dalle.dropout=0.1"), DATA, found) is False
        assert failed == ["vae", "vae", "clip", "clip"], "8, 4, 2: each is tried once"
        assert train(recipe("dalle.dropout=0.1"), DATA, found, resume=True)
        assert failed[4:] == ["dalle", "dalle"], "what has been found is remembered"
    halved = [(line["stage"], line["step"], line["micro_batch_size"]) for line in log(found) if len(line) == 4]
    assert halved == [(stage, 1, 2) for stage in ORDER]
    for stage in ORDER:
        ours, expected = (load_file(out / "checkpoint" / f"{stage}.safetensors") for out in (found, small))
        assert all(torch.equal(ours[name], expected[name]) for name in expected), stage


def stop_after(monkeypatch: pytest.MonkeyPatch, stage: str, step: int) -> None:
    """Notes a wish to stop in a stage's step, once."""
    one_step = loop.StageTrainer._one_step

    def stopping(self: loop.StageTrainer, prefetcher: Any) -> None:
        self.stop.requested = self.task.stage == stage and self.step + 1 == step
        one_step(self, prefetcher)

    monkeypatch.setattr(loop.StageTrainer, "_one_step", stopping)


def test_where_not_even_one_picture_fits_the_error_says_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LossModule, "forward", limited_memory({"vae": 0}, []))
    assert run_command(command(tmp_path / "run", "--stage", "vae")) == 1
    line = error_line(capfd.readouterr().err)
    assert "vae: one picture at a time is too much for the memory" in line
    assert "checkpoint_gradients to true" in line


def runs_out(original: Callable[..., Any], most: int, tried: list[int]) -> Callable[..., Any]:
    """A function that, without gradients, runs out of memory where its last argument has more than some rows."""

    def limited(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)  # fails late
        if not torch.is_grad_enabled():
            tried.append(len(arguments[-1]))
            if tried[-1] > most:
                raise MEMORY_ERRORS[len(tried) % 3]
        return result

    return limited


def evaluations(out: Path) -> list[dict[str, Any]]:
    lines = [line for line in log(out) if "evaluation" in line]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def test_evaluations_and_caches_take_fewer_pictures_where_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[Stage] = ["vae", "clip", "prior", "dalle"]
    own = recipe("dalle.image_prefix=2", *(f"train.prior.{value}" for value in QUICK))
    plenty, little = tmp_path / "plenty", tmp_path / "little"
    assert train(own, DATA, plenty, stages=stages)
    tried: dict[str, list[int]] = {}
    places = [(DiscreteVAE, "encode"), (CLIP, "places"), (Prior, "nll"), (DALLE, "loss"), (evaluation, "sample_rows")]
    for owner, name in places:
        limited = runs_out(getattr(owner, name), 1, tried.setdefault(name, []))
        monkeypatch.setattr(owner, name, limited)
    assert train(own, DATA, little, stages=stages)
    assert all(1 in sizes for sizes in tried.values())
    assert {name for name, sizes in tried.items() if max(sizes) > 1} >= {"encode", "places", "nll", "loss"}
    for ours, expected in zip(evaluations(little), evaluations(plenty), strict=True):
        assert ours.pop("stage") == expected.pop("stage")
        assert ours == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert np.array_equal(np.load(little / "cache" / "tokens.npy"), np.load(plenty / "cache" / "tokens.npy"))
    embeddings = [np.load(out / "cache" / "embeddings.npy").astype(np.float32) for out in (little, plenty)]
    assert np.allclose(*embeddings, atol=1e-3)


def test_an_evaluation_remembers_how_many_pictures_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(DiscreteVAE, "encode", runs_out(DiscreteVAE.encode, 1, tried))
    assert train(recipe("train.vae.evaluations=4"), DATA, tmp_path / "run", stages=["vae"])
    assert sum(size > 1 for size in tried) == 1 and len(evaluations(tmp_path / "run")) == 4


def test_an_evaluation_that_does_not_fit_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its error used to be a traceback, and its steps were lost: --resume went through them to the same end."""
    whole, out, steps = tmp_path / "whole", tmp_path / "run", []
    assert run_command(command(whole, "--stage", "vae")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(DiscreteVAE, "encode", runs_out(DiscreteVAE.encode, 0, []))
        capfd.readouterr()
        assert run_command(command(out, "--stage", "vae")) == 1
        line = error_line(capfd.readouterr().err)
        assert "vae: evaluating after 4 steps is too much for the memory (" in line
        for remedy in ("micro_batch_size", "checkpoint_gradients", "batch_size"):
            assert f"train.vae.{remedy}" in line
        assert "a smaller model" in line and "--resume goes on" in line
        assert StateFolder(out / "state" / "vae").step == 4
        one_step = loop.StageTrainer._one_step
        patch.setattr(loop.StageTrainer, "_one_step", lambda *args: (steps.append(1), one_step(*args)))
        assert run_command(command(out, "--stage", "vae", "--resume")) == 1
        assert "vae: evaluating after 4 steps" in error_line(capfd.readouterr().err)
    remedy = ("--set", "train.vae.checkpoint_gradients=true", "--set", "train.vae.micro_batch_size=4")
    assert run_command(command(out, "--stage", "vae", "--resume", *remedy)) == 0
    assert not steps, "no step was taken twice"
    assert_same(out, whole)


def test_an_optimizer_that_does_not_fit_is_one_clear_error_and_the_last_state_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run_command(command(whole, "--stage", "vae")) == 0
    update = loop.EMA.update

    def failing(self: loop.EMA, *arguments: Any) -> None:
        if self.num_updates == 2:
            raise MEMORY_ERRORS[0]
        update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.EMA, "update", failing)
        patch.setattr(loop, "SAVE_EVERY_SEC", 0.0)
        capfd.readouterr()
        assert run_command(command(out, "--stage", "vae")) == 1
    line = error_line(capfd.readouterr().err)
    assert "vae: the optimizer's step after 2 steps is too much for the memory (CUDA out of memory" in line
    assert StateFolder(out / "state" / "vae").step == 2
    assert run_command(command(out, "--stage", "vae", "--resume")) == 0
    assert_same(out, whole)


def test_a_picture_that_the_cache_cannot_encode_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run_command(command(out, "--stage", "vae")) == 0
    monkeypatch.setattr(DiscreteVAE, "encode", runs_out(DiscreteVAE.encode, 0, []))
    capfd.readouterr()
    assert run_command(command(out, "--stage", "dalle", "--resume")) == 1
    line = error_line(capfd.readouterr().err)
    assert "dalle: encoding pictures one at a time is too much for the memory (" in line and "free some memory" in line


def test_any_command_that_runs_out_of_memory_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def failing() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand where it went")

    monkeypatch.setattr("dalle_mini_impl.cli.caption.caption", failing)
    with pytest.raises(SystemExit) as ended:
        run_verb("caption", [])
    assert ended.value.code == 1
    line = error_line(capfd.readouterr().err)
    assert "too much for the memory (CUDA out of memory. Tried to allocate 2.00 GiB)" in line


def test_an_error_that_is_not_of_the_memory_is_raised_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes don't match")

    monkeypatch.setattr(LossModule, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes don't match"):
        train(recipe(), DATA, tmp_path / "run", stages=["vae"])


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small disk of its own in memory, where the system lets us have one."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting needs rights that this machine doesn't give: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # pictures may still be mapped


def test_a_full_disk_leaves_the_last_good_state_and_room_lets_it_go_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk", "size=2m") as disk:
        out = disk / "run"
        steps = ("--stage", "vae", "--set", "train.vae.steps=6", "--set", "train.vae.evaluations=6")
        probe = tmp_path / "probe"
        assert run_command(command(probe, *steps)) == 0
        used = sum(path.stat().st_size for path in probe.rglob("*") if path.is_file())
        capfd.readouterr()
        (disk / "filler").write_bytes(b"\0" * (2 * 2**20 - used - 24 * 2**10))
        assert run_command(command(out, *steps)) == 1
        line = error_line(capfd.readouterr().err)
        assert str(out) in line and "No space left on device" in line
        assert "free some space" in line and "--resume goes on" in line
        states = StateFolder(out / "state" / "vae")
        assert 1 <= states.load()["step"] < 6
        (disk / "filler").unlink()
        assert run_command(command(out, *steps, "--resume")) == 0
        assert [line["step"] for line in log(out) if "evaluation" in line] == [1, 2, 3, 4, 5, 6]
        assert_same(out, probe)


def test_a_folder_that_cant_be_written_to_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def touch(path: Path, *_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("pictures were read")

    monkeypatch.setattr(Path, "touch", touch)
    monkeypatch.setattr("dalle_mini_impl.training.task_builder.prepare", never)
    out = tmp_path / "run"
    assert run_command(command(out)) == 1
    line = error_line(capfd.readouterr().err)
    assert f"error: {out}: Read-only file system" in line
    assert "nothing has been done yet" in line and "choose a place that you may read and write" in line


def test_a_disk_that_cant_be_written_to_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with mounted(tmp_path / "disk", "size=1m,ro") as disk:
        assert run_command(command(disk / "run")) == 1
        line = error_line(capfd.readouterr().err)
        assert str(disk / "run") in line and "Read-only file system" in line
