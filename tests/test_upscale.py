"""Faults of the upscaler that are forbidden here: ids that move, views that don't fit, options that do nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from dalle_mini_impl.cli.app import main
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.pipeline import TextToImage
from dalle_mini_impl.pretrained import build_upscaler, load_bundle, save_bundle
from dalle_mini_impl.sheet import read_metadata
from dalle_mini_impl.training.batches import BatchOrder
from dalle_mini_impl.training.run import train
from dalle_mini_impl.training.task import StepContext
from dalle_mini_impl.training.tasks.upscale import UpscaleTask
from dalle_mini_impl.vae.upsampler import Upscaler, enlarge, inputs_of
from tests.processes import train_in_processes
from tests.test_training_run import DATA, lines, recipe
from tests.test_training_tasks import batch_of, data, gradients, token_cache
from tests.tiny import randomize, tiny_bundle

SMALL = ("upscale.factor=2", "upscale.width=8", "upscale.blocks=1")


def _large(made: PreparedData) -> PreparedData:
    """The same pictures, each pixel four times."""
    pictures = made.pictures.repeat(2, axis=1).repeat(2, axis=2)
    splits = ["validation" if i >= 24 else "train" for i in range(len(made))]
    return PreparedData(pictures, made.names, made.captions, splits, {}, "large")  # type: ignore[arg-type]


def upscale_task(*overrides: str) -> UpscaleTask:
    bundle = tiny_bundle(*SMALL, *overrides)
    assert bundle.vae is not None
    upscaler = build_upscaler(bundle.recipe, bundle.vae)
    randomize(upscaler)
    made = data()
    cache = token_cache(len(bundle.recipe.data.views))
    return UpscaleTask(upscaler, made, _large(made), bundle.recipe, cache, bundle.vae)


@pytest.mark.parametrize("quantizer", ["vq", "fsq", "gumbel"])
@pytest.mark.parametrize(("downsample", "patch"), [(4, 2), (8, 8), (4, 4)])
def test_ids_become_pictures_of_twice_the_size(quantizer: str, downsample: int, patch: int) -> None:
    bundle = tiny_bundle(f"vae.quantizer={quantizer}", f"vae.downsample={downsample}", f"vae.patch={patch}", *SMALL)
    assert bundle.vae is not None
    upscaler = build_upscaler(bundle.recipe, bundle.vae)
    randomize(upscaler)
    ids = torch.randint(bundle.vae.num_codes, (3, bundle.stream.num_image_tokens))
    pictures = upscaler.decode(ids, bundle.vae)
    assert pictures.shape == (3, 3, 32, 32) and pictures.min() >= 0 and pictures.max() <= 1
    assert not torch.allclose(pictures[0], pictures[1], atol=1e-3)
    with pytest.raises(ValueError, match=r"ids have shape \(3, 2\)"):
        upscaler.decode(ids[:, :2], bundle.vae)
    names = {id(p): name for name, p in upscaler.named_parameters()}
    hidden = {names[id(p)] for p in upscaler.hidden_matrices()}
    assert hidden and all(name.endswith("weight") for name in hidden)
    assert not {"stem.weight", "codes.weight", "head.weight"} & hidden


@pytest.mark.parametrize("micro_batch_size", [1, 5])
def test_cutting_a_batch_up_changes_nothing_and_the_vae_stays_frozen(micro_batch_size: int) -> None:
    task = upscale_task()
    batch = batch_of(task)
    whole_metrics, whole = gradients(task, batch, None)
    cut_metrics, cut = gradients(task, batch, micro_batch_size)
    assert cut_metrics == pytest.approx(whole_metrics, rel=1e-4)
    assert whole.keys() == dict(task.model.named_parameters()).keys(), "every parameter learns"
    for name, gradient in whole.items():
        assert torch.allclose(cut[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-7), name
    assert all(p.grad is None for p in task.vae.parameters())


def test_a_mirrored_view_has_mirrored_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    task = upscale_task('data.views=["plain", "flip"]')
    batch = batch_of(task)
    assert set(batch["view"].tolist()) == {0, 1}
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        Upscaler,
        "loss",
        lambda self, images, codes, small: (seen.append(images.clone()), (images.sum() * 0, {}))[1],
    )
    task.loss(task.model, batch, StepContext(task.counts(batch), 0.0, torch.Generator(), batch))
    plain = batch["pixels"].permute(0, 3, 1, 2) / 255
    for row, view in enumerate(batch["view"].tolist()):
        assert torch.allclose(seen[0][row], plain[row].flip(-1) if view else plain[row])
    expected = task.cache.tokens[batch["view"].numpy(), _items(task)]
    assert np.array_equal(batch["ids"].numpy(), expected)


def _items(task: UpscaleTask) -> np.ndarray:
    order = BatchOrder(task.num_items, 12, seed=0)
    return task.data.train[order.items(order.positions(0))]


def test_other_pictures_at_twice_the_size_are_refused() -> None:
    task = upscale_task()
    other = _large(data())
    other.names = other.names[::-1]
    with pytest.raises(ValueError, match="gives other pictures"):
        UpscaleTask(task.model, task.data, other, task.recipe, task.cache, task.vae)  # type: ignore[arg-type]


def test_untrained_it_only_enlarges() -> None:
    bundle = tiny_bundle(*SMALL)
    assert bundle.vae is not None
    ids = torch.randint(32, (2, 16))
    upscaler = build_upscaler(bundle.recipe, bundle.vae)
    small = bundle.vae.decode(ids)
    large = upscaler.decode(ids, bundle.vae)
    assert torch.allclose(large, enlarge(small), atol=1e-6)
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    assert torch.allclose(
        enlarge(ramp)[..., 2:-2], torch.linspace(-1 / 60, 61 / 60, 32).expand(1, 3, 32, 32)[..., 2:-2], atol=0.01
    )


def test_an_upscaler_can_fit_pictures() -> None:
    bundle = tiny_bundle(*SMALL)
    assert bundle.vae is not None
    torch.manual_seed(0)
    upscaler = build_upscaler(bundle.recipe, bundle.vae)
    ids = torch.randint(32, (4, 16))
    target = F.interpolate(torch.rand(4, 3, 8, 8), size=32, mode="bicubic").clamp(0, 1)
    codes, small = inputs_of(ids, bundle.vae)
    optimizer = torch.optim.AdamW(upscaler.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss, _ = upscaler.loss(target, codes, small)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


QUICK = ["steps=6", "batch_size=8", "evaluations=2", "warmup_steps=3", "precision=fp32", "optimizer=adamw"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose recipe asks for an upscaler."""
    out = tmp_path_factory.mktemp("runs") / "upscale"
    assert train(recipe(*SMALL, *(f"train.upscale.{value}" for value in QUICK)), DATA, out)
    return out


def test_a_run_trains_an_upscaler_last(finished: Path, tmp_path: Path) -> None:
    bundle = load_bundle(finished)
    assert isinstance(bundle.upscale, Upscaler)
    metrics = bundle.metadata["metrics"]
    assert list(metrics) == ["vae", "clip", "dalle", "upscale"]
    assert {"psnr", "ssim", "psnr_resized", "ssim_resized"} <= metrics["upscale"].keys()
    assert (finished / "samples" / "upscale-000006.png").is_file()
    large = PreparedData.open(finished / "data-large")
    assert large.pictures.shape[1:] == (32, 32, 3)
    saved = save_bundle(bundle, tmp_path / "half", storage="fp16")
    assert load_file(saved / "upscale.safetensors")["stem.weight"].dtype == torch.float16
    assert load_bundle(saved).upscale is not None


def test_a_finished_run_gains_an_upscaler(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(recipe(), DATA, out, stages=["vae"])
    assert load_bundle(out).upscale is None
    quick = ["train.upscale.steps=2", "train.upscale.batch_size=8", "train.upscale.precision=fp32"]
    assert train(recipe(*SMALL, *quick), DATA, out, stages=["upscale"])
    assert load_bundle(out).upscale is not None


def test_two_processes_train_what_one_does(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "two")
    shutil.rmtree(out / "state" / "upscale")
    own = recipe(*SMALL, *(f"train.upscale.{value}" for value in QUICK))
    before = lines(finished, "upscale")
    assert train_in_processes(own, DATA, out, world_size=2, stages=["upscale"]) == [0, 0]
    for ours, theirs in zip(lines(out, "upscale"), before, strict=True):
        assert ours.pop("stage") == theirs.pop("stage")
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4)
    one, two = (load_file(run / "checkpoint" / "upscale.safetensors") for run in (finished, out))
    assert all(torch.allclose(weight, two[name], atol=1e-4) for name, weight in one.items())


def _run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def test_upscaled_pictures_have_the_tokens_and_scores_of_small_ones(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--checkpoint", finished, "--prompt", "a red circle", "--candidates", 2, "--seed", 3)
    for name, more in (("small", []), ("large", ["--upscale"])):
        assert _run("sample", *options, *more, "--out", tmp_path / name) == 0
    lines = [
        [json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines()]
        for name in ("small", "large")
    ]
    assert lines[0] == lines[1], "the scores are of the small pictures"
    for line in lines[0]:
        small, large = (tmp_path / name / line["file"] for name in ("small", "large"))
        assert read_metadata(small)["tokens"] == read_metadata(large)["tokens"]
        with Image.open(small) as image, Image.open(large) as twice:
            assert twice.size == (2 * image.width, 2 * image.height)
    again = tmp_path / "again.png"
    assert _run("replay", tmp_path / "large" / lines[0][0]["file"], "--out", again) == 0
    with Image.open(again) as image:
        assert image.size == (32, 32)
    capsys.readouterr()
    assert _run("sample", "--prompt", "x", "--upscale", "--out", tmp_path / "emoji") == 2
    assert "'emoji' has no upscaler" in capsys.readouterr().err


def test_a_run_that_asks_for_no_upscaler_trains_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"upscale\.factor is 1"):
        train(recipe(), DATA, tmp_path / "run", stages=["upscale"])
    with pytest.raises(ValueError, match="upscale needs a VAE"):
        train(recipe(*SMALL), DATA, tmp_path / "other", stages=["upscale"])


def test_pictures_from_python() -> None:
    bundle = tiny_bundle(*SMALL)
    assert bundle.vae is not None
    model = TextToImage(replace(bundle, upscale=build_upscaler(bundle.recipe, bundle.vae)))
    picture = model.draw(["a red circle"], settings=model.settings(upscale=True))[0][0]
    assert picture.image.size == (32, 32)
    with pytest.raises(ValueError, match="has no upscaler"):
        TextToImage(bundle).upscale(picture.tokens[None])
