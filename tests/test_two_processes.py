"""Two processes compute what one computes: losses, gradients, codebook."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dalle_mini_impl.config import Stage
from tests.processes import train_in_processes
from tests.test_training_run import DATA, lines, recipe


def compare(one: Path, two: Path, stage: Stage, name: str) -> None:
    for ours, theirs in zip(lines(two, stage), lines(one, stage), strict=True):
        assert ours.pop("stage") == theirs.pop("stage")
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4)
    expected, found = (torch.load(out.with_name(f"gradients-{out.name}") / f"{name}.pt") for out in (one, two))
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        largest = gradient.abs().max().item()
        assert torch.allclose(found[parameter], gradient, rtol=1e-3, atol=1e-4 * largest + 1e-8), parameter


def train_both(tmp_path: Path, names: dict[str, int], stages: list[Stage], *overrides: str) -> None:
    settings = recipe("clip.caption_layers=1", *overrides)
    for name, world_size in names.items():
        point = {0: f"gradients:{tmp_path / f'gradients-{name}'}"}
        codes = train_in_processes(settings, DATA, tmp_path / name, point, world_size=world_size, stages=stages)
        assert codes == [0] * world_size


def test_two_processes_see_the_losses_and_gradients_of_one(tmp_path: Path) -> None:
    train_both(tmp_path, {"vae-of-one": 1, "vae-of-two": 2}, ["vae"])
    compare(tmp_path / "vae-of-one", tmp_path / "vae-of-two", "vae", "DiscreteVAE")
    vaes = [load_file(tmp_path / f"vae-of-{n}" / "checkpoint" / "vae.safetensors") for n in ("one", "two")]
    assert vaes[0]["quantizer.updates"] == vaes[1]["quantizer.updates"] >= 2
    assert torch.allclose(vaes[0]["quantizer.codebook"], vaes[1]["quantizer.codebook"], atol=0.01)
    for name in ("one", "two", "siglip-of-one", "siglip-of-two"):  # the same pictures' ids for all
        shutil.copytree(tmp_path / "vae-of-one", tmp_path / name)
    train_both(tmp_path, {"siglip-of-one": 1, "siglip-of-two": 2}, ["clip"], "clip.loss=siglip")
    compare(tmp_path / "siglip-of-one", tmp_path / "siglip-of-two", "clip", "CLIP")
    assert torch.load(tmp_path / "gradients-siglip-of-two" / "CLIP.pt")["logit_bias"].item() != 0, "SigLIP's own"
    train_both(tmp_path, {"one": 1, "two": 2}, ["clip", "dalle"])
    compare(tmp_path / "one", tmp_path / "two", "clip", "CLIP")
    compare(tmp_path / "one", tmp_path / "two", "dalle", "DALLE")
