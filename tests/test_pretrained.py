"""Faults of checkpoints that are forbidden here: loading half a model, needing flags, hiding what is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dalle_mini_impl import pretrained
from dalle_mini_impl.pretrained import Storage, checkpoint_hash, load_bundle, resolve, save_bundle
from dalle_mini_impl.text import TextTokenizer
from tests.tiny import TINY_CAPTIONS, tiny_bundle, tiny_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "tiny")


def test_a_checkpoint_loads_as_it_was_saved(tmp_path: Path) -> None:
    saved = tiny_bundle()
    saved = dataclasses.replace(saved, metadata={"data_fingerprint": "abc", "metrics": {"dalle": {"bits": 3.5}}})
    loaded = load_bundle(save_bundle(saved, tmp_path / "tiny"))
    assert loaded.recipe == saved.recipe
    assert loaded.stream == saved.stream
    assert loaded.tokenizer.fingerprint == saved.tokenizer.fingerprint
    assert loaded.metadata["metrics"] == {"dalle": {"bits": 3.5}}
    assert loaded.metadata["data_fingerprint"] == "abc"
    for name in ("vae", "dalle", "clip"):
        before, after = getattr(saved, name).state_dict(), getattr(loaded, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert not getattr(loaded, name).training
    card = (tmp_path / "tiny" / "README.md").read_text(encoding="utf-8")
    assert "from_pretrained" in card and '"bits": 3.5' in card


def test_saving_a_loaded_checkpoint_changes_nothing(folder: Path, tmp_path: Path) -> None:
    again = save_bundle(load_bundle(folder), tmp_path / "again")
    assert checkpoint_hash(again) == checkpoint_hash(folder)


@pytest.mark.parametrize("storage", ["fp16", "bf16"])
def test_half_precision_storage_halves_the_file_and_loads_as_fp32(
    storage: Storage, folder: Path, tmp_path: Path
) -> None:
    bundle = load_bundle(folder)
    assert bundle.dalle is not None
    save_bundle(bundle, tmp_path / "half", storage=storage)
    full, half = ((path / "dalle.safetensors").stat().st_size for path in (folder, tmp_path / "half"))
    assert half < 0.6 * full
    loaded = load_bundle(tmp_path / "half")
    assert loaded.dalle is not None
    assert {parameter.dtype for parameter in loaded.dalle.parameters()} == {torch.float32}
    for before, after in zip(bundle.dalle.parameters(), loaded.dalle.parameters(), strict=True):
        assert torch.allclose(before, after, atol=1e-2)


def test_models_that_arent_trained_yet_are_absent(folder: Path) -> None:
    bundle = load_bundle(folder)
    save_bundle(dataclasses.replace(bundle, dalle=None), folder)
    assert not (folder / "dalle.safetensors").exists(), "weights of another run were left behind"
    loaded = load_bundle(folder)
    assert loaded.dalle is None
    assert loaded.vae is not None


def test_loading_leaves_the_global_generator_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    load_bundle(folder)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [0, 5, 5000])
def test_a_truncated_file_is_named(folder: Path, size: int) -> None:
    path = folder / "dalle.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"dalle\.safetensors is corrupted"):
        load_bundle(folder)


@pytest.mark.parametrize("place", [0.3, 0.99])
def test_a_flipped_bit_is_refused_by_name(folder: Path, place: float) -> None:
    path = folder / "dalle.safetensors"
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"dalle\.safetensors is corrupted \(its SHA-256.*copy or download it again"):
        load_bundle(folder)


def test_weights_that_dont_fit_are_named(folder: Path) -> None:
    path = folder / "dalle.safetensors"
    tensors = load_file(path)
    head = tensors.pop("image_head.weight")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"dalle\.safetensors.*missing image_head\.weight"):
        load_bundle(folder)
    save_file({**tensors, "image_head.weight": head, "extra": head.clone()}, path)
    with pytest.raises(ValueError, match="unknown extra"):
        load_bundle(folder)
    save_file({**tensors, "image_head.weight": head[:-1].contiguous()}, path)
    with pytest.raises(ValueError, match=r"image_head\.weight is \(31, 32\), expected \(32, 32\)"):
        load_bundle(folder)


def test_another_tokenizer_is_refused(folder: Path) -> None:
    TextTokenizer.train([*TINY_CAPTIONS, "something else"], 300).save(folder / "tokenizer.model")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not the tokenizer"):
        load_bundle(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.model is missing"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": {"dalle": {"dimm": 3}}}, "unknown key 'dalle.dimm'"),
        ({"format": 99}, "update the package"),
        ({"text_length": "16"}, "no valid text_length"),
    ],
)
def test_a_config_that_is_wrong_is_explained(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_bundle(folder)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_bundle(folder)


def test_a_killed_save_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = checkpoint_hash(folder)

    def dies(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("dalle_mini_impl.weights.save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        save_bundle(tiny_bundle(seed=1), folder)
    assert checkpoint_hash(folder) == before
    load_bundle(folder)


def test_the_hash_tells_weights_apart(folder: Path, tmp_path: Path) -> None:
    assert checkpoint_hash(folder) == load_bundle(folder).checkpoint_hash
    assert checkpoint_hash(folder) != checkpoint_hash(tiny_checkpoint(tmp_path / "other", seed=1))


def test_names_resolve_to_built_in_then_folder_then_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve(folder) == folder
    tiny_checkpoint(tmp_path / "runs" / "mine" / "checkpoint")
    assert resolve(tmp_path / "runs" / "mine") == tmp_path / "runs" / "mine" / "checkpoint"
    monkeypatch.setattr(pretrained, "BUILT_IN", tmp_path)
    assert resolve("tiny") == tmp_path / "tiny"
    with pytest.raises(ValueError, match="built-in names: tiny"):
        resolve("tinny")
    with pytest.raises(ValueError, match=r"no checkpoint folder: it has no config\.json"):
        resolve(tmp_path / "runs")


def test_a_hub_id_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append(hub_id)
        # Only what a checkpoint is made of: whatever else a repository has may be many gigabytes.
        assert {"config.json", "dalle.safetensors"} < set(allow_patterns) and not any("*" in p for p in allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_bundle("somebody/tiny").recipe.name == "tiny"
    assert asked == ["somebody/tiny"]


def test_a_hub_that_cant_be_reached_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(hub_id: str, allow_patterns: list[str]) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match=r"no folder 'somebody/tiny' here, and the hub didn't give it \(no network\)"):
        load_bundle("somebody/tiny")
