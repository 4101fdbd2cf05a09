"""What a run starts from: a checkpoint, or some of its models, the others fresh and the recipe's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dalle_mini_impl.cli.train import PresetName, _recipe
from dalle_mini_impl.config import MODELS
from dalle_mini_impl.pretrained import load_bundle, save_bundle
from dalle_mini_impl.training.run import train
from dalle_mini_impl.training.start import load_start, split_start
from tests.test_training_run import recipe
from tests.tiny import tiny_bundle

DATA = "shapes:count=40"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole one."""
    return save_bundle(tiny_bundle(), tmp_path_factory.mktemp("start") / "checkpoint")


def test_models_may_be_named_behind_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_start("emoji") == ("emoji", MODELS)
    assert split_start("emoji:vae") == ("emoji", ("vae",))
    assert split_start("somebody/theirs:clip, vae") == ("somebody/theirs", ("clip", "vae"))
    assert split_start("a:b/c") == ("a:b/c", MODELS), "a name that is nobody's: what loads it says so"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine:vae").mkdir()
    assert split_start("mine:vae") == ("mine:vae", MODELS), "a folder's own name"


def test_what_cannot_be_taken_is_told(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model is called 'vea'; there are clip, vae, dalle, prior, upscale"):
        split_start("emoji:vea,clip")
    with pytest.raises(ValueError, match="dalle is of no use without its vae: take both"):
        load_start(f"{checkpoint}:dalle,clip")
    by_embeddings = save_bundle(tiny_bundle("dalle.image_prefix=2"), tmp_path / "by-embeddings")
    with pytest.raises(ValueError, match="dalle is of no use without its clip: take both"):
        load_start(f"{by_embeddings}:vae,dalle")
    assert load_start(f"{checkpoint}:vae,dalle").dalle is not None
    without = save_bundle(replace(load_bundle(checkpoint), clip=None), tmp_path / "without")
    with pytest.raises(ValueError, match=r"checkpoint .*without has no clip"):
        load_start(f"{without}:vae,clip")


def test_the_models_that_are_not_named_are_left_out(checkpoint: Path) -> None:
    whole, part = load_start(str(checkpoint)), load_start(f"{checkpoint}:vae,clip")
    assert whole.dalle is not None and part.dalle is None
    assert part.vae is not None and part.clip is not None
    assert part.tokenizer.fingerprint == whole.tokenizer.fingerprint


def test_a_run_trains_the_others_from_nothing_by_its_own_recipe(checkpoint: Path, tmp_path: Path) -> None:
    base, own = load_bundle(checkpoint), recipe("dalle.dim=48", "vae.width=64", steps=2)
    start, out = f"{checkpoint}:vae,clip", tmp_path / "run"
    assert train(own, DATA, out, stages=["dalle"], init_from=start)
    bundle = load_bundle(out)
    assert bundle.dalle is not None and bundle.dalle.config.dim == 48
    assert bundle.dalle.num_views == 2, "the recipe's views: none was learned"
    for name in ("vae", "clip"):
        ours, theirs = getattr(bundle, name).state_dict(), getattr(base, name).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), name
    assert train(own, DATA, out, stages=["clip"], init_from=start), "the same start is the same run"
    with pytest.raises(ValueError, match="init-from was"):
        train(own, DATA, out, stages=["vae"], init_from=f"{checkpoint}:vae")


def test_a_vae_alone_leaves_the_text_to_the_run(checkpoint: Path, tmp_path: Path) -> None:
    own, out = recipe("text.max_length=40", steps=2), tmp_path / "run"
    assert train(own, DATA, out, stages=["vae"], init_from=f"{checkpoint}:vae")
    base, bundle = load_bundle(checkpoint), load_bundle(out)
    assert bundle.recipe.text.max_length == 40
    assert bundle.tokenizer.fingerprint != base.tokenizer.fingerprint
    fresh = tmp_path / "fresh"
    assert train(own, DATA, fresh, stages=["vae"])
    assert bundle.tokenizer.fingerprint == load_bundle(fresh).tokenizer.fingerprint
    assert train(own, DATA, out, stages=["dalle"]), "what it started from is remembered"


def test_with_some_models_alone_the_recipe_is_chosen(checkpoint: Path, tmp_path: Path) -> None:
    whole = _recipe(tmp_path / "run", None, str(checkpoint), None, [])
    assert whole is not None and whole.dalle.dim == load_bundle(checkpoint).recipe.dalle.dim
    assert _recipe(tmp_path / "run", None, f"{checkpoint}:vae,clip", None, []) is None
    assert _recipe(tmp_path / "run", None, f"{checkpoint}:vae", PresetName.built_in, []) is not None
