"""Adversarial training: gradients that reach one side only, ids that stay, runs that resume to the bit."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from dalle_mini_impl.cli.app import main, run_verb
from dalle_mini_impl.config import Recipe
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.pretrained import load_bundle, save_bundle
from dalle_mini_impl.training.checkpoint import StateFolder
from dalle_mini_impl.training.fidelity import eyes_of, fidelity, through
from dalle_mini_impl.training.run import train
from dalle_mini_impl.training.stages import stage_order
from dalle_mini_impl.training.task import EvaluationContext, StepContext
from dalle_mini_impl.training.tasks.vqgan import VQGANTask
from dalle_mini_impl.vae.augment import diff_augment
from dalle_mini_impl.vae.discriminator import PatchDiscriminator, generator_loss
from dalle_mini_impl.vae.model import DiscreteVAE
from tests.processes import train_in_processes
from tests.test_training_run import DATA, QUICK, crash, lines, terminate, train_interrupted
from tests.test_training_tasks import batch_of, data, gradients
from tests.tiny import tiny_bundle, tiny_recipe

AT_ONCE = ("vqgan.alone_steps=0", "vqgan.ramp_steps=0")


def vqgan_task(*overrides: str) -> VQGANTask:
    """A task whose discriminator pulls from its second step on."""
    small = ("vqgan.discriminator_width=4", "vqgan.discriminator_layers=1")
    bundle = tiny_bundle(*AT_ONCE, *small, *overrides)
    assert bundle.vae is not None and bundle.clip is not None
    bundle.vae.quantizer.register_buffer("updates", torch.ones(1))  # its codebook is in use
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(4, 1)
    return VQGANTask(bundle.vae, bundle.clip, discriminator, data(), bundle.recipe, Accelerator(cpu=True))


def warmed_up(*overrides: str) -> VQGANTask:
    """The same after two steps of the discriminator: the adaptive weight is known."""
    task = vqgan_task(*overrides)
    for number in (0, 1):
        gradients(task, batch_of(task, step=number), None)
        task.after_step(task.model, torch.Generator().manual_seed(number))
    return task


def bits(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# --- who learns what ---


@pytest.mark.parametrize("kind", ["hinge", "nonsaturating"])
def test_each_sides_step_leaves_the_other_untouched(kind: str) -> None:
    task = warmed_up(f'vqgan.loss="{kind}"')
    vae, clip, discriminator = task.model, task.clip, task.adversary.discriminator
    before = {name: bits(model) for name, model in (("vae", vae), ("clip", clip), ("discriminator", discriminator))}
    _, grads = gradients(task, batch_of(task), None)
    assert set(grads) == {name for name, _ in vae.named_parameters() if name.startswith("decoder.")}
    assert all(bool(grad.abs().sum() > 0) for grad in grads.values()), "every weight of the decoder learns"
    assert all(parameter.grad is None for model in (clip, discriminator) for parameter in model.parameters())
    assert same(bits(discriminator), before["discriminator"]), "the decoder's loss moves no discriminator"
    kept = {name: grad.clone() for name, grad in grads.items()}
    task.after_step(vae, torch.Generator())
    assert not same(bits(discriminator), before["discriminator"])
    assert same(bits(vae), before["vae"]) and same(bits(clip), before["clip"])
    assert all(torch.equal(p.grad, kept[name]) for name, p in vae.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("phase", ["decoder", "full"])
@pytest.mark.parametrize("perceptual", ["clip", "none"])
def test_the_gradient_is_that_of_the_plain_sum_of_losses(phase: str, perceptual: str) -> None:
    task = warmed_up(f'vqgan.phase="{phase}"', f'vqgan.perceptual="{perceptual}"', "vae.balance_weight=0.1")
    batch, vae = batch_of(task), task.model
    assert isinstance(vae, DiscreteVAE)
    weight = task.adversary.adversarial_weight(2)
    assert weight > 0
    metrics, grads = gradients(task, batch, None)
    vae.zero_grad()
    images = batch["pixels"].permute(0, 3, 1, 2) / 255
    output = vae.redecode(images) if phase == "decoder" else vae(images, 1.0)
    terms = vae.quantizer_terms(output) | vae.reconstruction_terms(images, output.raw)
    total = torch.stack(list(terms.values())).sum()
    if task.perceptual is not None:
        total = total + task.config.perceptual_weight * task.perceptual(images, output.reconstruction)
    fake = task.adversary.discriminator(diff_augment(output.reconstruction - 0.5, batch["draws"], task.config.augment))
    total = total + weight * generator_loss(fake, task.config.loss)
    total.backward()
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert ("encoder.1.weight" in grads) == (phase == "full")
    for name, parameter in vae.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert torch.allclose(grads[name], parameter.grad, rtol=1e-3, atol=1e-6), name


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms_at_the_last_layer() -> None:
    task = vqgan_task('vqgan.perceptual="none"', "vqgan.weight=1", "vqgan.augment=[]")
    assert task.adversary.adversarial_weight(0) == 0, "nothing is known yet"
    batch, vae = batch_of(task), task.model
    assert isinstance(vae, DiscreteVAE)
    images = batch["pixels"].permute(0, 3, 1, 2) / 255
    output = vae.redecode(images)
    others = torch.stack(list(vae.reconstruction_terms(images, output.raw).values())).sum()
    adversarial = generator_loss(task.adversary.discriminator(output.reconstruction - 0.5), "hinge")
    norms = [torch.autograd.grad(loss, vae.last_layer, retain_graph=True)[0].norm() for loss in (others, adversarial)]
    gradients(task, batch, None)
    task.after_step(vae, torch.Generator())
    assert task.adversary.adversarial_weight(1).item() == pytest.approx((norms[0] / norms[1]).item(), rel=1e-3)
    capped = vqgan_task("vqgan.max_adaptive_weight=0.001", "vqgan.weight=1")
    gradients(capped, batch, None)
    capped.after_step(capped.model, torch.Generator())
    assert capped.adversary.adversarial_weight(1).item() == pytest.approx(0.001)


def test_the_weight_rises_along_its_ramp() -> None:
    adversary = vqgan_task("vqgan.alone_steps=10", "vqgan.ramp_steps=4", "vqgan.weight=0.5").adversary
    adversary.ratio = torch.tensor(2.0)
    weights = [adversary.adversarial_weight(step).item() for step in (0, 10, 11, 12, 14, 50)]
    assert weights == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("phase", ["decoder", "full"])
@pytest.mark.parametrize("micro_batch_size", [1, 5])
def test_cutting_a_batch_up_changes_neither_side(micro_batch_size: int, phase: str) -> None:
    whole, cut = (warmed_up(f'vqgan.phase="{phase}"') for _ in range(2))
    for number in (2, 3):
        batch = batch_of(whole, step=number)
        metrics, grads = gradients(whole, batch, None)
        cut_metrics, cut_grads = gradients(cut, batch, micro_batch_size)
        assert cut_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-6)
        for name, grad in grads.items():
            assert torch.allclose(cut_grads[name], grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item() + 1e-7), name
        for task in (whole, cut):
            task.after_step(task.model, torch.Generator().manual_seed(number))
        assert cut.adversary.ratio.item() == pytest.approx(whole.adversary.ratio.item(), rel=1e-3)
        assert torch.allclose(cut.adversary.anchors, whole.adversary.anchors, atol=1e-5)
        expected = bits(whole.adversary.discriminator)
        for name, tensor in bits(cut.adversary.discriminator).items():
            assert torch.allclose(tensor, expected[name], atol=5e-5), name


def test_while_the_discriminator_learns_alone_the_loss_has_no_graph() -> None:
    task = vqgan_task("vqgan.alone_steps=5")
    batch = batch_of(task)
    counts, before = task.counts(batch), bits(task.adversary.discriminator)
    for phase in ("alone", "together"):
        context = StepContext(counts, 0.0, torch.Generator(), batch, 4 if phase == "alone" else 5)
        task.before_step(task.model, [batch], [context])
        loss, metrics = task.loss(task.model, batch, context)
        assert loss.requires_grad == (phase == "together")
        assert ("adversarial_weight" in metrics) == (phase == "together")
        assert all(not value.requires_grad for value in metrics.values())
    task.after_step(task.model, torch.Generator())
    assert not same(bits(task.adversary.discriminator), before)


def test_a_discriminator_tells_rebuilt_pictures_from_true_ones_in_a_few_steps() -> None:
    task = vqgan_task("vqgan.alone_steps=1000", "vqgan.discriminator_learning_rate=0.005")
    for number in range(30):
        batch = batch_of(task, step=number)
        context = StepContext(task.counts(batch), 0.0, torch.Generator(), batch, number)
        task.before_step(task.model, [batch], [context])
        _, metrics = task.loss(task.model, batch, context)
        task.after_step(task.model, torch.Generator())
    assert metrics["real_logit"] > metrics["fake_logit"] + 1
    assert metrics["discriminator"] < 0.5


def test_a_skipped_step_leaves_no_trace_in_the_discriminator() -> None:
    one, other = warmed_up(), warmed_up()
    gradients(one, batch_of(one, step=7), None)  # its step is skipped: after_step isn't called
    for task in (one, other):
        gradients(task, batch_of(task, step=8), None)
        task.after_step(task.model, torch.Generator())
    assert same(bits(one.adversary.discriminator), bits(other.adversary.discriminator))
    assert torch.equal(one.adversary.ratio, other.adversary.ratio)


def test_a_discriminator_whose_gradient_is_not_finite_waits_and_ends_the_run_after_a_few() -> None:
    task = warmed_up()
    before = bits(task.adversary.discriminator)
    for attempt in range(5):
        gradients(task, batch_of(task), None)
        task.adversary._grads[0][0] = float("nan")
        if attempt < 4:
            task.after_step(task.model, torch.Generator())
            assert same(bits(task.adversary.discriminator), before)
    with pytest.raises(FloatingPointError, match=r"discriminator's gradient was not finite in 5 steps"):
        task.after_step(task.model, torch.Generator())


# --- what is measured ---


def test_fidelity_of_perfect_and_of_blurred_pictures(tmp_path: Path) -> None:
    made, clip = data(), tiny_bundle().clip
    assert clip is not None
    context = EvaluationContext(Accelerator(cpu=True), tmp_path, 1, None)
    indices, eyes = np.arange(24), eyes_of(clip)
    perfect = fidelity(lambda images: images, eyes, made, indices, context)
    assert perfect["rfd"] == pytest.approx(0, abs=1e-6) and perfect["sharpness"] == 1
    assert perfect["rfd_local"] == pytest.approx(0, abs=1e-6)
    for name in ("rfd", "rfd_local"):
        assert perfect[f"{name}_apart"] == pytest.approx(perfect[f"{name}_floor"], rel=1e-6)
        assert perfect[f"{name}_floor"] > 0

    def blur(images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)

    blurred = fidelity(blur, eyes, made, indices, context)
    assert blurred["rfd"] > 1e-4 and blurred["sharpness"] < 0.7 and blurred["psnr"] < perfect["psnr"]
    assert blurred["rfd_local"] > 1e-4
    few = fidelity(blur, eyes, made, indices[:3], context)
    assert few.keys() == {"psnr", "ssim", "sharpness", "rfd", "rfd_local"}


# --- whole runs ---


def recipe(*overrides: str, steps: int = 6) -> Recipe:
    stages = ("vae", "clip", "dalle", "vqgan")
    settings = [f"train.{stage}.{value}" for stage in stages for value in (*QUICK, f"steps={steps}")]
    settings += [f"train.{stage}.optimizer=adamw" for stage in stages]
    settings += ["vqgan.alone_steps=2", "vqgan.ramp_steps=2", "vqgan.discriminator_width=4"]
    return tiny_recipe(*settings, "vqgan.discriminator_layers=1", "vae.quantize_after=0", *overrides)


def checkpoint(out: Path) -> dict[str, Tensor]:
    vae = load_bundle(out).vae
    assert vae is not None
    return bits(vae)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose usual stages are finished."""
    out = tmp_path_factory.mktemp("runs") / "before"
    assert train(recipe(), DATA, out)
    return out


@pytest.fixture(scope="module")
def finished(before: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its decoder trained further, by a recipe that lists the stage."""
    out = shutil.copytree(before, tmp_path_factory.mktemp("runs") / "finished")
    assert train(recipe('train.stages=["vae", "clip", "dalle", "vqgan"]'), DATA, out)
    return out


def test_the_decoder_phase_keeps_ids_encoder_codes_and_dalle_to_the_bit(before: Path, finished: Path) -> None:
    old, new = load_bundle(before), load_bundle(finished)
    assert old.vae is not None and new.vae is not None and old.dalle is not None and new.dalle is not None
    ours, theirs = bits(new.vae), bits(old.vae)
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
    assert same(bits(new.dalle), bits(old.dalle))
    images = PreparedData.open(finished / "data").images(range(60))
    assert torch.equal(new.vae.encode(images), old.vae.encode(images))


def test_the_id_cache_outlives_a_new_decoder(before: Path, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "again")
    tokens = out / "cache" / "tokens.npy"
    was, when = tokens.read_bytes(), tokens.stat().st_mtime_ns
    shutil.rmtree(out / "state" / "dalle")
    assert train(recipe(), DATA, out, stages=["dalle"])
    assert tokens.stat().st_mtime_ns == when and tokens.read_bytes() == was


def test_each_evaluation_measures_and_shows_before_and_after(before: Path, finished: Path) -> None:
    evaluation = lines(finished, "vqgan")[-1]
    assert evaluation.keys() >= {"psnr", "ssim", "sharpness", "rfd", "psnr_before", "rfd_before", "sharpness_before"}
    assert evaluation["psnr_before"] == pytest.approx(lines(before, "vae")[-1]["psnr"], rel=1e-5)
    sheets = sorted(path.name for path in (finished / "samples").glob("vqgan-*.png"))
    assert sheets == ["vqgan-000003.png", "vqgan-000006.png"]
    with Image.open(finished / "samples" / sheets[0]) as sheet:
        assert sheet.height > 3 * 96
    metrics = load_bundle(finished).metadata["metrics"]
    assert set(metrics) == {"vae", "clip", "dalle", "vqgan"}
    assert {path.name for path in (finished / "checkpoint").iterdir()} == {
        path.name for path in (before / "checkpoint").iterdir()
    }, "the discriminator is no part of the checkpoint"


def test_alone_the_discriminator_leaves_the_checkpoint_as_it_was(before: Path, tmp_path: Path) -> None:
    out = shutil.copytree(before, tmp_path / "alone")
    assert train(recipe("vqgan.alone_steps=100"), DATA, out, stages=["vqgan"])
    assert same(checkpoint(out), checkpoint(before))


def test_the_full_phase_trains_everything_and_comes_before_dalle(before: Path, tmp_path: Path) -> None:
    full = recipe('vqgan.phase="full"', "vqgan.alone_steps=1")
    assert stage_order(full) == ("vae", "clip", "vqgan", "prior", "dalle", "distill", "upscale")
    with pytest.raises(ValueError, match=r"would change what dalle in .*: set vqgan.phase to decoder, or"):
        train(full, DATA, shutil.copytree(before, tmp_path / "refused"), stages=["vqgan"])
    out = tmp_path / "full"
    assert train(full, DATA, out, stages=["vqgan"], init_from=str(before))
    bundle = load_bundle(out)
    assert bundle.dalle is None, "it knows other ids"
    ours, theirs = checkpoint(out), checkpoint(before)
    for part in ("encoder.", "decoder.", "quantizer.codebook"):
        assert any(not torch.equal(ours[name], theirs[name]) for name in ours if name.startswith(part)), part
    assert train(full, DATA, out, stages=["dalle"])
    assert load_bundle(out).dalle is not None


@pytest.mark.parametrize(("step", "how"), [(2, terminate), (5, crash)])
def test_resuming_loses_neither_a_step_nor_a_bit_of_either_side(
    before: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, how: Any
) -> None:
    out = shutil.copytree(before, tmp_path / "resumed")
    train_interrupted(monkeypatch, recipe(), out, "vqgan", step, how)
    assert train(recipe(), DATA, out, stages=["vqgan"], resume=True)
    assert lines(out, "vqgan") == lines(finished, "vqgan")
    assert same(checkpoint(out), checkpoint(finished))


def test_resuming_the_full_phase_loses_nothing_of_encoder_and_codes_either(
    before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = recipe('vqgan.phase="full"', "vqgan.alone_steps=1")
    whole, resumed = (shutil.copytree(before, tmp_path / name) for name in ("whole", "resumed"))
    for out in (whole, resumed):
        shutil.rmtree(out / "state" / "dalle")  # it is to come after
    assert train(full, DATA, whole, stages=["vqgan"])
    train_interrupted(monkeypatch, full, resumed, "vqgan", 4, crash)
    assert train(full, DATA, resumed, stages=["vqgan"], resume=True)
    assert lines(resumed, "vqgan") == lines(whole, "vqgan")
    assert same(checkpoint(resumed), checkpoint(whole)) and not same(checkpoint(whole), checkpoint(before))


def test_the_discriminators_state_comes_back_whole(before: Path, tmp_path: Path) -> None:
    task = warmed_up()
    path = StateFolder(tmp_path)
    path.save({"step": 1, **task.state_dict()})
    other = vqgan_task()
    other.load_state_dict(path.load())
    for one in (task, other):
        gradients(one, batch_of(one, step=9), None)
        one.after_step(one.model, torch.Generator())
    assert same(bits(task.adversary.discriminator), bits(other.adversary.discriminator))
    assert torch.equal(task.adversary.anchors, other.adversary.anchors)


def test_two_processes_train_what_one_does(before: Path, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(before, tmp_path / "two")
    assert train_in_processes(recipe(), DATA, out, world_size=2, stages=["vqgan"]) == [0, 0]
    for ours, theirs in zip(lines(out, "vqgan"), lines(finished, "vqgan"), strict=True):
        assert ours.pop("stage") == theirs.pop("stage")
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4)
    expected = checkpoint(finished)
    assert all(torch.allclose(tensor, expected[name], atol=1e-4) for name, tensor in checkpoint(out).items())


# --- from the command line ---


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        run_verb("train", arguments)
    code = exit_.value.code
    return code if isinstance(code, int) else 0


def test_from_the_command_line(before: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = [f"train.vqgan.{value}" for value in (*QUICK, "steps=3")]
    settings += ["vqgan.alone_steps=1", "vqgan.discriminator_layers=1", "vqgan.discriminator_width=4"]
    sets = [part for setting in settings for part in ("--set", setting)]
    base = ["--init-from", str(before), "--data", DATA, "--out", str(out), "--stage", "vqgan", *sets]
    assert command(*base) == 0
    assert (out / "samples" / "vqgan-000003.png").is_file()
    assert json.loads((out / "run.json").read_text())["recipe"]["train"]["vqgan"]["optimizer"] == "adamw"
    bundle = load_bundle(out)
    assert bundle.vae is not None and bundle.dalle is not None


def test_reconstruct_compares_two_checkpoints_by_a_third(
    before: Path, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    judge = save_bundle(tiny_bundle(seed=5), tmp_path / "judge")
    arguments = ["reconstruct", "--checkpoint", str(finished), "--before", str(before), "--judge", str(judge)]
    arguments += ["--data", str(finished / "data"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["judge"] == str(judge) and results["num_pictures"] == 3
    old, new = (results["checkpoints"][str(name)] for name in (before, finished))
    assert old["psnr"] == pytest.approx(lines(before, "vae")[-1]["psnr"], rel=1e-5)
    assert old["rfd"] != new["rfd"] and old["hash"] != new["hash"]
    assert (tmp_path / "out" / "sheet.png").is_file() and "sharpness" in capfd.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        main(["reconstruct", "--data", str(finished / "data"), "--out", str(tmp_path / "out")])
    assert exit_.value.code == 2 and "pictures of 80 pixels" in capfd.readouterr().err


def test_without_a_vae_it_says_what_to_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.toml").write_text("[data]\nimage_size = 16\n[vae]\ndownsample = 4\npatch = 2\n")
    base = ["--config", str(tmp_path / "r.toml"), "--data", DATA, "--out", str(tmp_path / "run"), "--stage", "vqgan"]
    assert command(*base) == 2
    assert "vqgan needs a trained VAE" in capfd.readouterr().err


def test_stages_of_a_recipe_are_named_once() -> None:
    with pytest.raises(ValueError, match="none twice"):
        Recipe.parse({}, ['train.stages=["vae", "vae"]'])
    with pytest.raises(ValueError, match=r"train\.stages"):
        Recipe.parse({}, ['train.stages=["gan"]'])


def test_partial_settings_of_the_stage_keep_its_other_defaults() -> None:
    changed = Recipe.parse({}, ["train.vqgan.steps=5"]).train.vqgan
    assert (changed.optimizer, changed.learning_rate, changed.beta1) == ("adamw", 3e-4, 0.5)


def test_the_vae_before_is_not_the_one_that_trains() -> None:
    task = vqgan_task()
    assert task.model is not task.before
    images = torch.rand(2, 3, 16, 16)
    expected = copy.deepcopy(task.before)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(1)
    assert torch.equal(through(task.before)(images), through(expected)(images))
