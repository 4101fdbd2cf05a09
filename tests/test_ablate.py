"""The ablation runner: arms share what they don't change, are judged alike, and aren't repeated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from accelerate import Accelerator

from dalle_mini_impl.bench.ablate import (
    JUDGED,
    Ablation,
    arm_folder,
    begin_from,
    judged,
    judging,
    read_plan,
    read_recipes,
    share_out,
    shared_stages,
    table,
)
from dalle_mini_impl.cli.app import main
from dalle_mini_impl.config import STAGES, Recipe, Stage
from dalle_mini_impl.pretrained import load_bundle
from dalle_mini_impl.training.run import train
from tests.test_emoji import needs_font
from tests.tiny import TINY_VALUES, tiny_checkpoint

DATA = "shapes:count=40"
CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ([], ["vae", "clip"]),
        (["dalle.layers=1", "train.dalle.batch_size=8", "sampling.top_k=5"], ["vae", "clip"]),
        (["clip.width=16"], ["vae"]),
        (["dalle.layers=1", "vae.width=8"], []),
        (['data.views=["plain","flip"]', "dalle.layers=1"], ["vae", "clip"]),
        (["data.image_size=32"], []),
        (["seed=1", "dalle.layers=1"], ["vae", "clip"]),
        (["text.slot_step=8"], []),
    ],
)
def test_an_arm_shares_the_stages_that_its_settings_leave_alone(settings: list[str], stages: list[str]) -> None:
    assert shared_stages(settings) == stages


def test_cores_are_shared_out_evenly() -> None:
    assert share_out([4, 5, 6], 2) == [[4], [5]]
    with pytest.raises(ValueError, match="3 jobs on 2 cores"):
        share_out([0, 1], 3)


def test_a_plan_is_a_list_of_settings_an_arm(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('[arms]\n"as it is" = []\ndeep = ["dalle.layers=12"]\n')
    assert read_plan(path) == {"as it is": [], "deep": ["dalle.layers=12"]}
    path.write_text('[arms]\ndeep = "dalle.layers=12"\n')
    with pytest.raises(ValueError, match="it must be a list"):
        read_plan(path)
    path.write_text("")
    with pytest.raises(ValueError, match="has no arms"):
        read_plan(path)


def test_an_arm_may_have_a_recipe_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text("[arms]\nours = []\n")
    assert read_recipes(path) == {}
    path.write_text('[arms]\nours = []\n[recipes]\nours = "ours.toml"\n')
    with pytest.raises(ValueError, match=r"no recipe at .*ours\.toml; its path starts beside the plan"):
        read_recipes(path)
    (tmp_path / "ours.toml").touch()
    assert read_recipes(path) == {"ours": tmp_path / "ours.toml"}
    path.write_text('[arms]\nours = []\n[recipes]\nouts = "ours.toml"\n')
    with pytest.raises(ValueError, match="recipe of 'outs', but there is no such arm"):
        read_recipes(path)


@pytest.mark.parametrize(
    ("plan", "config"), [("codes", "shapes"), ("dalle", "shapes"), ("size", "shapes"), ("dalle1", "dalle1-shapes")]
)
def test_the_arms_of_the_plans_that_ship_are_recipes(plan: str, config: str) -> None:
    path = CONFIGS / "ablations" / f"{plan}.toml"
    recipes = read_recipes(path)
    arms = read_plan(path)
    parsed = [Recipe.from_toml(recipes.get(name, CONFIGS / f"{config}.toml"), arms[name]) for name in arms]
    unnamed = [recipe.model_dump_json(exclude={"name"}) for recipe in parsed]
    assert len(set(unnamed)) == len(arms), "two arms are the same recipe"


def test_every_stage_that_an_arm_may_train_is_judged() -> None:
    assert JUDGED.keys() == set(get_args(Stage))


def test_a_table_leaves_out_what_nobody_measured() -> None:
    lines = table([{"arm": "a", "settings": ["x=1"], "dalle_steps": 5}, {"arm": "b", "settings": []}]).splitlines()
    assert lines == ["| arm | settings | steps |", "|---|---|---|", "| a | `x=1` | 5 |", "| b | – | – |"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of two steps a stage, and its recipe."""
    folder = tmp_path_factory.mktemp("base")
    steps = {stage: {"steps": 2, "batch_size": 4} for stage in STAGES}
    values = {
        **TINY_VALUES,
        "name": "recipe",
        "data": {"image_size": 32},
        "train": steps,
    }  # the checker needs 32 pixels
    (folder / "recipe.toml").write_text(as_toml(values))
    recipe = Recipe.from_toml(folder / "recipe.toml")
    assert train(recipe, DATA, folder / "run", accelerator=Accelerator(cpu=True))
    return folder


def as_toml(values: dict[str, Any], section: str = "") -> str:
    """Nested values as TOML; plain ones come first."""
    own = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items() if not isinstance(value, dict))
    nested = {f"{section}.{key}".lstrip("."): value for key, value in values.items() if isinstance(value, dict)}
    return own + "".join(f"[{name}]\n{as_toml(value, name)}" for name, value in nested.items())


def test_an_arm_begins_with_the_finished_stages_of_its_base(base: Path, tmp_path: Path) -> None:
    begin_from(base / "run", tmp_path / "arm", ["vae", "clip"])
    bundle, theirs = load_bundle(tmp_path / "arm" / "checkpoint"), load_bundle(base / "run")
    assert bundle.dalle is None and bundle.vae is not None and theirs.vae is not None
    for name, weight in bundle.vae.state_dict().items():
        assert weight.equal(theirs.vae.state_dict()[name]), name
    (tmp_path / "arm" / "state" / "clip" / "finished.json").unlink()
    with pytest.raises(ValueError, match="has not finished clip"):
        begin_from(tmp_path / "arm", tmp_path / "other", ["vae", "clip"])


def test_arms_are_trained_judged_and_not_repeated(base: Path, tmp_path: Path) -> None:
    ablation = Ablation(base / "recipe.toml", DATA, tmp_path, base=base / "run", prompts=2)
    results = ablation.run({"as it is": [], "more steps": ["train.dalle.steps=3"]})
    assert [result["dalle_steps"] for result in results] == [2, 3]
    assert all(0 <= result["single_seen"] <= 1 and result["dalle_image_nll"] > 0 for result in results)
    assert "vae_steps" not in results[0], "the VAE is the base's"
    written = (tmp_path / "results.jsonl").read_text()
    assert ablation.run({"more steps": ["train.dalle.steps=3"]}) == results[1:]
    assert (tmp_path / "results.jsonl").read_text() == written
    with pytest.raises(RuntimeError, match="train failed with exit status 2"):
        ablation.run({"broken": ["dalle.dims=3"]})


@needs_font
def test_emoji_are_judged_by_their_glyphs(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "arm", "data.image_size=32", "vae.downsample=8")
    values: dict[str, float] = {}
    for report, command in judging("emoji:scenes=5", checkpoint, 3).items():
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert not ended.value.code
        values |= judged(report)
    assert values == {"single_emoji": 0.0, "single_emoji-scenes": 0.0}
    assert "| right, names | right, scenes |" in table([{"arm": "a", "settings": [], **values}])
    assert judging("folder-of-pictures", checkpoint, 3) == {}


def test_an_arm_with_other_views_encodes_them_beside_the_base(base: Path, tmp_path: Path) -> None:
    before = np.load(base / "run" / "cache" / "tokens.npy")
    ablation = Ablation(base / "recipe.toml", DATA, tmp_path, base=base / "run", prompts=0)
    (result,) = ablation.run({"mirrored": ['data.views=["plain","flip"]']})
    assert "vae_steps" not in result and result["dalle_steps"] == 2
    own = np.load(arm_folder(tmp_path, "mirrored") / "cache" / "tokens.npy")
    assert own.shape[0] == 2 and np.array_equal(own[0], before[0])
    assert np.array_equal(np.load(base / "run" / "cache" / "tokens.npy"), before)


def test_an_arm_with_a_recipe_of_its_own_shares_nothing(base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "paper.toml"
    text = (base / "recipe.toml").read_text().replace("codebook_size = 32", "codebook_size = 24")
    recipe.write_text(text)
    arms = {"paper": ["vae.quantizer=gumbel", "vae.reconstruction=logit_laplace", "dalle.attention=dalle1"]}
    ablation = Ablation(base / "recipe.toml", DATA, tmp_path, base=base / "run", prompts=2, recipes={"paper": recipe})
    (result,) = ablation.run(arms)
    assert result["vae_steps"] == 2 and result["recipe"] == str(recipe)
    bundle = load_bundle(tmp_path / "paper")
    assert bundle.recipe.dalle.layer_patterns == ("row", "conv") and bundle.recipe.vae.num_codes == 24
    assert "`paper.toml` `vae.quantizer=gumbel`" in table([result])


def test_a_bad_plan_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("[arms]\n")
    arguments = ["plan.toml", "--config", "c.toml", "--data", "shapes", "--out", "out"]
    command = [sys.executable, "-m", "dalle_mini_impl.bench.ablate", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: plan.toml has no arms: write [arms]") and done.stderr.count("\n") == 1
