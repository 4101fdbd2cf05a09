"""``train.py`` as a person types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dalle_mini_impl.cli.app import run_verb
from dalle_mini_impl.pretrained import load_bundle
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


def test_one_stage_from_the_command_line(toml: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    base = ["--config", str(toml), "--data", "shapes:count=30", "--out", str(out), "--stage", "vae"]
    assert run(*base, "--set", "train.vae.steps=2", "--set", 'name="other"') == 0
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
