"""Distillation of guidance: the divergence is the true one, it falls, and what isn't to change doesn't."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.config import Recipe
from dalle_mini_impl.pipeline import TextToImage
from dalle_mini_impl.pretrained import load_bundle
from dalle_mini_impl.stream import NULL
from dalle_mini_impl.training.run import train
from dalle_mini_impl.training.task_builder import TaskBuilder
from dalle_mini_impl.training.tasks.distill import DistillTask
from tests.processes import train_in_processes
from tests.test_training_run import DATA, QUICK, crash, lines, terminate, train_interrupted
from tests.test_training_tasks import batch_of, data, gradients, token_cache
from tests.test_vqgan import command
from tests.tiny import tiny_bundle, tiny_recipe

READS = "dalle.reading_share=0.25"


def distill_task(*overrides: str) -> DistillTask:
    bundle = tiny_bundle(*overrides)
    assert bundle.vae is not None and bundle.dalle is not None
    return DistillTask(bundle.dalle, data(), bundle.recipe, bundle.tokenizer, token_cache(), bundle.vae)


@pytest.mark.parametrize("overrides", [(), (READS,), ("text.slot_step=4", "text.fit_length=false")])
def test_the_divergence_is_that_of_what_the_sampler_draws_from(overrides: tuple[str, ...]) -> None:
    task = distill_task("sampling.guidance_schedule=constant", "sampling.guidance=2.5", *overrides)
    batch = batch_of(task)
    metrics, _ = gradients(task, batch, None)
    dalle, total, count = task.before, 0.0, 0
    with torch.no_grad():
        for row in (~batch["reads"]).nonzero()[:, 0].tolist():
            _, text = dalle.stream.groups(batch["text"][row : row + 1])[0]
            ids = batch["inputs"][row : row + 1]
            own = dalle(text, ids)[1][0].float()
            null = dalle(torch.full_like(text, NULL), ids)[1][0].float()
            guided = torch.distributions.Categorical(logits=null + 2.5 * (own - null))
            divergence = torch.distributions.kl_divergence(guided, torch.distributions.Categorical(logits=own))
            total, count = total + float(divergence.sum()), count + len(divergence)
    assert metrics["guidance_kl"] == pytest.approx(total / count, rel=1e-3) and total > 0


def test_the_null_caption_has_nothing_to_learn() -> None:
    task = distill_task("dalle.caption_dropout=1", "dalle.text_loss_weight=0")
    metrics, gradient = gradients(task, batch_of(task), None)
    assert metrics["guidance_kl"] == pytest.approx(0.0, abs=1e-6)
    assert all(float(value.abs().max()) < 1e-6 for value in gradient.values())


def test_every_weight_has_a_gradient_where_no_row_is_read() -> None:
    """Processes that train together wait for each other's, whatever rows each of them has."""
    task = distill_task("dalle.reading_share=0.125")
    batch = batch_of(task)
    batch["reads"] = torch.zeros_like(batch["reads"])
    gradients(task, batch, None)
    assert not [name for name, weight in task.model.named_parameters() if weight.grad is None]


def test_the_teacher_is_where_training_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundle, device = tiny_bundle(), torch.device("meta")
    monkeypatch.setattr(TaskBuilder, "cache", lambda *_: token_cache())
    accelerator: Any = SimpleNamespace(device=device)
    builder = TaskBuilder(bundle.recipe, DATA, data(), tmp_path, accelerator, bundle, None)
    task = builder.build("distill")
    assert isinstance(task, DistillTask)
    assert {weight.device for weight in task.before.parameters()} == {device}


def test_it_falls_and_the_teacher_stays() -> None:
    task = distill_task(READS)
    before = {name: value.clone() for name, value in task.before.state_dict().items()}
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=3e-3, weight_decay=0.0)
    divergences = []
    for _ in range(30):
        optimizer.zero_grad()
        divergences.append(gradients(task, batch_of(task), None)[0]["guidance_kl"])
        optimizer.step()
    assert divergences[-1] < 0.5 * divergences[0]
    assert all(torch.equal(value, before[name]) for name, value in task.before.state_dict().items())
    assert all(parameter.grad is None for parameter in task.before.parameters())


@pytest.mark.parametrize("size", [1, 5])
def test_cutting_a_batch_up_changes_nothing(size: int) -> None:
    task = distill_task(READS)
    (metrics, whole), (others, parts) = (gradients(task, batch_of(task), cut) for cut in (None, size))
    assert others == pytest.approx(metrics, rel=1e-4)
    assert all(torch.allclose(value, parts[name], atol=1e-5) for name, value in whole.items())


def test_without_guidance_there_is_nothing_to_distill() -> None:
    with pytest.raises(ValueError, match="guidance is 1, so that there is nothing to distill"):
        distill_task("sampling.guidance=1")


# --- whole runs ---


def recipe(*overrides: str, steps: int = 6) -> Recipe:
    stages = ("vae", "clip", "dalle", "distill")
    settings = [f"train.{stage}.{value}" for stage in stages for value in (*QUICK, f"steps={steps}")]
    settings += [f"train.{stage}.optimizer=adamw" for stage in stages]
    return tiny_recipe('data.views=["plain", "flip"]', *settings, READS, *overrides)


def weights(out: Path) -> dict[str, Tensor]:
    dalle = load_bundle(out).dalle
    assert dalle is not None
    return dalle.state_dict()


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose usual stages are finished."""
    out = tmp_path_factory.mktemp("runs") / "before"
    assert train(recipe(), DATA, out)
    return out


@pytest.fixture(scope="module")
def finished(before: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its DALL·E distilled, by a recipe that lists the stage."""
    out = shutil.copytree(before, tmp_path_factory.mktemp("runs") / "finished")
    assert train(recipe('train.stages=["vae", "clip", "dalle", "distill"]'), DATA, out)
    return out


def test_a_distilled_checkpoint_draws_without_guidance(before: Path, finished: Path, tmp_path: Path) -> None:
    assert load_bundle(before).recipe.sampling.guidance == 2.0
    model = TextToImage.from_pretrained(finished)
    assert model.settings().guidance == 1.0 and model.settings(guidance=3.0).guidance == 3.0
    assert json.loads((finished / "run.json").read_text())["recipe"]["sampling"]["guidance"] == 2.0
    assert any(not torch.equal(value, weights(before)[name]) for name, value in weights(finished).items())
    for part in ("vae", "clip"):
        ours, theirs = (getattr(load_bundle(out), part).state_dict() for out in (finished, before))
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert model.bundle.metadata["metrics"]["distill"]["steps"] == 6
    last = lines(finished, "distill")[-1]
    assert last["guidance_kl"] >= 0 and {"guidance_kl_before", "image_nll", "read_nll"} <= last.keys()
    assert (finished / "samples" / "distill-000006.png").is_file()
    out = shutil.copytree(finished, tmp_path / "further")  # a later stage keeps what was distilled
    further = recipe('train.stages=["vae", "clip", "dalle", "distill", "vqgan"]', "train.vqgan.steps=2")
    assert train(further, DATA, out)
    assert load_bundle(out).recipe.sampling.guidance == 1.0


def test_a_dalle_that_is_trained_anew_needs_guidance_again(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "anew")
    shutil.rmtree(out / "state" / "dalle")
    assert train(recipe(), DATA, out, stages=["dalle"])
    assert load_bundle(out).recipe.sampling.guidance == 2.0
    assert train(recipe("train.vqgan.steps=2"), DATA, out, stages=["vqgan"])
    assert load_bundle(out).recipe.sampling.guidance == 2.0


@pytest.mark.parametrize(("step", "how"), [(2, terminate), (5, crash)])
def test_resuming_loses_neither_a_step_nor_a_bit(
    before: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, how: Any
) -> None:
    out = shutil.copytree(before, tmp_path / "resumed")
    train_interrupted(monkeypatch, recipe(), out, "distill", step, how)
    assert train(recipe(), DATA, out, stages=["distill"], resume=True)
    assert lines(out, "distill") == lines(finished, "distill")
    expected = weights(finished)
    assert all(torch.equal(value, expected[name]) for name, value in weights(out).items())


def test_two_processes_train_what_one_does(before: Path, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(before, tmp_path / "two")
    assert train_in_processes(recipe(), DATA, out, world_size=2, stages=["distill"]) == [0, 0]
    for ours, theirs in zip(lines(out, "distill"), lines(finished, "distill"), strict=True):
        assert ours.pop("stage") == theirs.pop("stage")
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4)
    expected = weights(finished)
    assert all(torch.allclose(value, expected[name], atol=1e-4) for name, value in weights(out).items())


def test_from_the_command_line(before: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    sets = [part for value in (*QUICK, "steps=3") for part in ("--set", f"train.distill.{value}")]
    base = ["--data", DATA, "--out", str(out), "--stage", "distill", *sets]
    assert command("--init-from", str(before), *base) == 0
    assert load_bundle(out).recipe.sampling.guidance == 1.0
    assert f"is ready: python sample.py --checkpoint {out} --prompt" in capfd.readouterr().err
    (tmp_path / "r.toml").write_text("[data]\nimage_size = 16\n[vae]\ndownsample = 4\npatch = 2\n")
    base = ["--data", DATA, "--out", str(tmp_path / "none"), "--stage", "distill"]
    assert command("--config", str(tmp_path / "r.toml"), *base) == 2
    assert "distill needs a VAE" in capfd.readouterr().err
