"""Recipes: nothing misspelt, ignored or lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from dalle_mini_impl.config import Recipe, Section

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


def test_the_default_recipe_is_valid_and_survives_json() -> None:
    recipe = Recipe()
    assert recipe.grid_size * recipe.vae.downsample == recipe.data.image_size
    assert Recipe.parse(json.loads(recipe.model_dump_json())) == recipe


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_says_what_it_is_for(path: Path) -> None:
    recipe = Recipe.from_toml(path)
    assert recipe.name == path.stem
    assert path.read_text(encoding="utf-8").startswith("#")


def test_an_override_replaces_one_value_only() -> None:
    recipe = Recipe.parse({}, ["train.dalle.steps=500", "vae.quantizer=fsq", 'data.views=["plain", "flip"]'])
    assert recipe.train.dalle.steps == 500
    assert recipe.vae.quantizer == "fsq"
    assert recipe.data.views == ("plain", "flip")
    assert recipe.train.dalle.batch_size == Recipe().train.dalle.batch_size
    assert recipe.train.clip == Recipe().train.clip


@pytest.mark.parametrize("stage", ["vae", "clip", "dalle", "prior", "vqgan"])
def test_setting_one_key_of_a_stage_leaves_the_others_as_they_are(stage: str) -> None:
    default = getattr(Recipe().train, stage)
    changed = getattr(Recipe.parse({}, [f"train.{stage}.warmup_steps=7"]).train, stage)
    assert changed == default.model_copy(update={"warmup_steps": 7})


@pytest.mark.parametrize("stage", ["vae", "dalle"])
def test_adamw_on_matrices_is_gentler_unless_told_otherwise(stage: str) -> None:
    adamw, rate = f"train.{stage}.optimizer=adamw", f"train.{stage}.learning_rate"
    beside_muon, alone, told = (
        getattr(Recipe.parse({}, settings).train, stage).learning_rate
        for settings in ([], [adamw], [adamw, f"{rate}=0.01"])
    )
    assert (beside_muon, alone, told) == (8e-3, 2e-3, 0.01)
    assert getattr(Recipe.parse({}, [f"{rate}=0.004"]).train, stage).learning_rate == 0.004


def test_later_overrides_win_and_inputs_stay_as_they_were() -> None:
    values = {"dalle": {"layers": 3}}
    assert Recipe.parse(values, ["dalle.layers=4", "dalle.layers=5"]).dalle.layers == 5
    assert values == {"dalle": {"layers": 3}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dalle.layerz=4", "'layers'"),
        ("dale.layers=4", "'dalle'"),
        ("train.dalle.step=4", "'steps'"),
        ("dalle.layers", "section.key=value"),
        ("=4", "section.key=value"),
        ("dalle.layers=0", "dalle.layers"),
        ("dalle.layers=four", "given 'four'"),
        ("data.image_size=60", "multiple of vae.downsample"),
        ("dalle.heads=7", "dalle.dim 256"),
        ("vae.patch=8", "data.image_size"),
        ('data.views=["flip"]', "must start with"),
        ('data.views=["plain", "plain"]', "repeat nothing"),
        ("name.x=1", "name"),
    ],
)
def test_wrong_values_are_refused_in_the_users_terms(override: str, message: str) -> None:
    overrides = [override, "data.image_size=100"] if message == "data.image_size" else [override]
    with pytest.raises(ValueError, match=message) as raised:
        Recipe.parse({"name": "x"}, overrides)
    assert "pydantic" not in str(raised.value)


def test_all_wrong_keys_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)quantiser.*layerz"):
        Recipe.parse({"dalle": {"layerz": 1}, "vae": {"quantiser": "vq"}})


def test_a_bad_file_says_which(tmp_path: Path) -> None:
    (tmp_path / "shapes.toml").write_text("[dalle]\nlayers = 2\n", encoding="utf-8")
    (tmp_path / "broken.toml").write_text("[dalle\n", encoding="utf-8")
    assert Recipe.from_toml(tmp_path / "shapes.toml", ["dalle.dim=128"]).dalle.dim == 128
    with pytest.raises(ValueError, match=r"no recipe at .*shape.toml; there are broken.toml, shapes.toml"):
        Recipe.from_toml(tmp_path / "shape.toml")
    with pytest.raises(ValueError, match=r"broken.toml is not valid TOML"):
        Recipe.from_toml(tmp_path / "broken.toml")


def _sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    inner = [field.annotation for field in model.model_fields.values()]
    found = [kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [model, *(section for kind in found for section in _sections(kind))]


def test_every_section_is_strict_and_immutable() -> None:
    assert len(_sections(Recipe)) > 8
    for section in _sections(Recipe):
        assert issubclass(section, Section)
        assert section.model_config["extra"] == "forbid"
        assert section.model_config["frozen"]


def test_fsq_counts_the_codes_of_its_levels() -> None:
    recipe = Recipe.parse({}, ["vae.quantizer=fsq", "vae.fsq_levels=[8, 5, 5, 5]"])
    assert recipe.vae.num_codes == 1000
    assert Recipe().vae.num_codes == Recipe().vae.codebook_size


def test_what_would_fail_only_when_training_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"clip\.width 18 must be a multiple of clip\.heads 4"):
        Recipe.parse({}, ["clip.width=18"])
    stages = 'train.stages=["vae", "vqgan"]'
    with pytest.raises(ValueError, match=r"vqgan\.discriminator_layers 5 are too many for data\.image_size 64"):
        Recipe.parse({}, ["data.image_size=64", "vqgan.discriminator_layers=5", stages])
    Recipe.parse({}, ["data.image_size=64", "vqgan.discriminator_layers=4", stages])
    with pytest.raises(ValueError, match=r"seed: .*greater than or equal to 0 \(given -1\)"):
        Recipe.parse({}, ["seed=-1"])


@pytest.mark.parametrize(
    "recipe", [Recipe(name='quo"ted é'), *map(Recipe.from_toml, CONFIGS)], ids=lambda recipe: recipe.name
)
def test_a_recipe_written_as_toml_is_the_same_recipe(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml(["why", "it is so"]), encoding="utf-8")
    assert Recipe.from_toml(path) == recipe
    assert path.read_text(encoding="utf-8").startswith("# why\n# it is so\nname = ")
