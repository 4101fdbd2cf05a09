"""An exported checkpoint is half the size and draws what its original draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_mini_impl.cli import app
from dalle_mini_impl.pipeline import TextToImage
from tests.tiny import tiny_checkpoint


def _export(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        app.main(["export", *map(str, arguments)])
    return int(stop.value.code or 0)


def test_an_export_is_half_the_size_and_draws_nearly_the_same(tmp_path: Path) -> None:
    original = tiny_checkpoint(tmp_path / "original")
    assert _export(original, tmp_path / "copy") == 0
    for name in ("dalle.safetensors", "clip.safetensors"):
        sizes = [(folder / name).stat().st_size for folder in (original, tmp_path / "copy")]
        assert sizes[1] < 0.65 * sizes[0], name
    models = [TextToImage.from_pretrained(folder) for folder in (original, tmp_path / "copy")]
    ids = models[0]("a red circle", candidates=1)[0].tokens[None]
    first, second = (model.decode(ids) for model in models)
    assert torch.allclose(first, second, atol=0.02) and second.dtype == torch.float32


def test_exporting_nothing_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _export(tmp_path / "nowhere", tmp_path / "copy") == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()


def test_how_it_draws_can_be_set_and_what_it_is_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = tiny_checkpoint(tmp_path / "original")
    before = TextToImage.from_pretrained(original).bundle.recipe
    top_p, dim = before.sampling.top_p / 2, 2 * before.dalle.dim
    assert _export(original, tmp_path / "copy", "--set", f"sampling.top_p={top_p}") == 0
    after = TextToImage.from_pretrained(tmp_path / "copy").bundle.recipe
    assert after == before.model_copy(update={"sampling": before.sampling.model_copy(update={"top_p": top_p})})
    assert _export(original, tmp_path / "other", "--set", f"dalle.dim={dim}") == 2
    assert "only sampling" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert _export(original, tmp_path / "other", "--set", "sampling.top_q=1") == 2
    assert "top_p" in capsys.readouterr().err


def test_nothing_else_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = tiny_checkpoint(tmp_path / "original")
    before = (original / "dalle.safetensors").read_bytes()
    assert _export(original, original) == 2
    assert "is that checkpoint itself" in capsys.readouterr().err
    foreign = tmp_path / "project"
    foreign.mkdir()
    for name in ("README.md", "config.json"):
        (foreign / name).write_text("{}")
        assert _export(original, foreign) == 2
        assert "holds something else than a checkpoint" in capsys.readouterr().err
    assert (original / "dalle.safetensors").read_bytes() == before
    assert {path.name: path.read_text() for path in foreign.iterdir()} == {"README.md": "{}", "config.json": "{}"}
    other = tiny_checkpoint(tmp_path / "other", seed=3)
    assert _export(original, other) == 0, "that of another checkpoint is replaced"


def test_only_a_checkpoints_own_files_are_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = tiny_checkpoint(tmp_path / "original")
    asked: list[Any] = []

    class Hub:
        def create_repo(self, hub_id: str, *, exist_ok: bool) -> None:
            if "offline" in hub_id:
                raise RuntimeError("connection refused")

        def upload_folder(self, **options: Any) -> None:
            asked.append(options)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    copy = tiny_checkpoint(tmp_path / "copy", seed=3)
    (copy / "notes.md").write_text("private")
    assert _export(original, copy, "--push-to", "me/mine") == 0
    assert set(asked[0]["allow_patterns"]) == {path.name for path in copy.iterdir()} - {"notes.md"}
    capsys.readouterr()
    assert _export(original, copy, "--push-to", "me/offline") == 1
    assert "didn't take me/offline (connection refused)" in capsys.readouterr().err
