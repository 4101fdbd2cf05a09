"""``train.py`` as a person types it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_mini_impl.cli.app import run_verb
from dalle_mini_impl.pretrained import load_bundle
from dalle_mini_impl.training.checkpoint import StateFolder
from tests.tiny import tiny_recipe


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        run_verb("train", arguments)
    code = exit_.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    recipe = tiny_recipe("train.vae.batch_size=4", "train.vae.evaluations=1")
    path = tmp_path / "mine.toml"
    lines = ["[data]", f"image_size = {recipe.data.image_size}", "[text]", "vocab_size = 300", "[vae]"]
    lines += [f"{key} = {getattr(recipe.vae, key)}" for key in ("width", "latent_width", "codebook_size", "code_dim")]
    lines += ["downsample = 4", "patch = 2", "[train.vae]", "batch_size = 4", "evaluations = 1"]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_one_stage_from_the_command_line(toml: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    base = ["--config", str(toml), "--data", "shapes:count=30", "--out", str(out), "--stage", "vae"]
    assert run(*base, "--set", "train.vae.steps=2", "--set", 'name="other"') == 0
    said = capfd.readouterr().err
    assert f"{out / 'checkpoint'} is ready\n" in said and "sample.py" not in said, "a VAE alone draws nothing"
    bundle = load_bundle(out)
    assert bundle.vae is not None and bundle.dalle is None
    assert bundle.recipe.name == "other" and bundle.recipe.train.vae.steps == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "25"], "is no duration"),
        (["--set", "dalle.dims=3"], "did you mean 'dim'"),
        (["--config", "configs/nothing.toml"], "no recipe at"),
        (["--init-from", "nowhere"], "no checkpoint 'nowhere'"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = ["--data", "shapes:count=30", "--out", str(tmp_path / "run")]
    assert run(*base, *arguments) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_full_disk_is_told_in_one_line_and_costs_nothing_that_is_saved(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["--config", str(toml), "--data", "shapes:count=30", "--out", str(out), "--stage", "vae"]
    command += ["--set", "train.vae.steps=4", "--set", "train.vae.evaluations=4"]
    saves = 0

    def save(*arguments: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 4:  # the first is there before the first evaluation
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*arguments)

    original = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        assert run(*command) == 1
    error = capfd.readouterr().err
    (line,) = (line for line in error.splitlines() if line.startswith("error:"))
    assert "Traceback" not in error
    for words in ("step-00000003.pt", "No space left on device", "free some space", "--resume goes on"):
        assert words in line
    assert StateFolder(out / "state" / "vae").load()["step"] == 2
    assert run(*command, "--resume") == 0
    assert load_bundle(out).metadata["metrics"]["vae"]["steps"] == 4


def test_a_folder_that_cant_be_made_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run("--data", "shapes:count=30", "--out", str(tmp_path / "file" / "run")) == 1
    error = capfd.readouterr().err
    assert f"error: {tmp_path / 'file'}" in error and "choose another name" in error and "Traceback" not in error
