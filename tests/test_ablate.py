"""The ablation runner: arms share what they don't change, are judged alike, and aren't repeated."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import typer
from accelerate import Accelerator

from dalle_mini_impl.bench.ablate import (
    JUDGED,
    Ablation,
    judged,
    judging,
    share_out,
    table,
)
from dalle_mini_impl.bench.ablate import main as ablate
from dalle_mini_impl.bench.base_run import begin_from, check_base, shared_stages
from dalle_mini_impl.bench.law import read_runs
from dalle_mini_impl.bench.plan import arm_folder, read_plan, read_recipes
from dalle_mini_impl.cli.app import main
from dalle_mini_impl.config import STAGES, Recipe, Stage
from dalle_mini_impl.data.array_cache import Workers, build_array
from dalle_mini_impl.pretrained import load_bundle
from dalle_mini_impl.training.run import train
from tests.test_emoji import needs_font
from tests.tiny import TINY_VALUES, tiny_checkpoint

DATA = "shapes:count=40"
ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"


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


@pytest.mark.parametrize("names", [["rate × 2", "rate / 2"], [""], ["."], [".."]])
def test_arms_have_folders_of_their_own(tmp_path: Path, names: list[str]) -> None:
    """The second of two arms deleted the first one's run, or both trained in it; one without a name, all of them."""
    path = tmp_path / "plan.toml"
    path.write_text("[arms]\n" + "".join(f"{json.dumps(name)} = []\n" for name in names), encoding="utf-8")
    with pytest.raises(ValueError, match="would train in the same folder, rate_2" if names[1:] else "has no folder"):
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
    recipe = Recipe.from_toml(base / "recipe.toml")
    with pytest.raises(ValueError, match=r"arm holds no run \(no run\.json\)"):
        check_base(tmp_path / "arm", DATA, recipe, ["vae", "clip"])
    (tmp_path / "arm" / "run.json").symlink_to(base / "run" / "run.json")
    check_base(tmp_path / "arm", DATA, recipe, ["vae", "clip"])
    (tmp_path / "arm" / "state" / "clip" / "finished.json").unlink()
    check_base(tmp_path / "arm", DATA, recipe, ["vae"])
    with pytest.raises(ValueError, match="has not finished clip"):
        check_base(tmp_path / "arm", DATA, recipe, ["vae", "clip"])


def test_an_arm_never_writes_into_the_cache_of_its_base(base: Path, tmp_path: Path) -> None:
    cached = base / "run" / "cache"
    before = {path.name: path.read_bytes() for path in cached.iterdir()}
    begin_from(base / "run", tmp_path / "arm", ["vae", "clip"])
    own = tmp_path / "arm" / "cache"
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before, "it doesn't share the ids"
    build_array(own, "tokens", "of other pictures", (1, 2, 3), np.uint16, lambda array, share: None, Workers(), {})
    assert np.load(own / "tokens.npy").shape == (1, 2, 3)
    assert {path.name: path.read_bytes() for path in cached.iterdir()} == before


@pytest.mark.parametrize(
    ("data", "common", "changed"),
    [
        ("shapes:count=50", [], r"--data was shapes:count=40, now shapes:count=50"),
        (DATA, ["vae.codebook_size=24"], r"vae\.codebook_size was 32, now 24"),
        (DATA, ["clip.width=24", "text.max_length=20"], r"text\.max_length was 16, now 20; clip\.width was 16, now 24"),
        (DATA, ["data.validation_fraction=0.2"], r"data\.validation_fraction was 0\.05, now 0\.2"),
    ],
)
def test_arms_that_differ_from_their_base_in_what_they_take_over_are_refused_before_any_is_run(
    base: Path, tmp_path: Path, data: str, common: list[str], changed: str
) -> None:
    ablation = Ablation(base / "recipe.toml", data, tmp_path / "out", base=base / "run", common=common)
    with pytest.raises(ValueError, match=rf"can't start from .*run \({changed}\): give them what it was trained with"):
        ablation.run({"alone": ["vae.width=16"], "as it is": []})
    assert not (tmp_path / "out").exists()


def test_another_recipe_than_that_of_the_base_is_refused(base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "other.toml"
    recipe.write_text((base / "recipe.toml").read_text().replace("codebook_size = 32", "codebook_size = 24"))
    with pytest.raises(ValueError, match=r"vae\.codebook_size was 32, now 24"):
        Ablation(recipe, DATA, tmp_path / "out", base=base / "run").run({"as it is": []})


def test_the_documented_arms_have_the_data_of_their_base() -> None:
    (data,) = set(re.findall(r"--data (\S+) --out runs/shapes ", (ROOT / "README.md").read_text()))
    sources = [*(CONFIGS / "ablations").glob("*.toml"), ROOT / "dalle_mini_impl" / "bench" / "law.py"]
    texts = [path.read_text() for path in sources] + [(ROOT / "docs" / "experiments.md").read_text().split("\n## ")[0]]
    arms = [name for text in texts for name in re.findall(r"--data (\S+)[\s\\#]+--base runs/shapes ", text)]
    assert arms == [data] * 4
    assert f"--data {data} --out runs/shapes " in (CONFIGS / "shapes.toml").read_text()


def test_arms_are_trained_judged_and_not_repeated(base: Path, tmp_path: Path) -> None:
    ablation = Ablation(base / "recipe.toml", DATA, tmp_path, base=base / "run", prompts=2)
    results = ablation.run({"as it is": [], "more steps": ["train.dalle.steps=3"]})
    assert [result["dalle_steps"] for result in results] == [2, 3]
    assert all(0 <= result["single_seen"] <= 1 and result["dalle_image_nll"] > 0 for result in results)
    assert "vae_steps" not in results[0], "the VAE is the base's"
    written = (tmp_path / "results.jsonl").read_text()
    assert ablation.run({"more steps": ["train.dalle.steps=3"]}) == results[1:]
    assert (tmp_path / "results.jsonl").read_text() == written
    with pytest.raises(ValueError, match=r"dalle\.dims"):
        ablation.run({"fine": [], "broken": ["dalle.dims=3"]})
    assert (tmp_path / "results.jsonl").read_text() == written, "an arm was run before the broken one was found"


def test_a_result_of_something_else_is_not_taken_for_the_arms(base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text((base / "recipe.toml").read_text())
    ablation, arm = Ablation(recipe, DATA, tmp_path / "out", base=base / "run", prompts=0), {"an arm": ["seed=1"]}
    ablation.out.mkdir()
    row = {"arm": "an arm", "settings": ["seed=1"], "budget": None, "cores": 1}
    row |= {"measured_with": ablation.measured_with("an arm", ["seed=1"]), "dalle_steps": 2}
    (ablation.out / "results.jsonl").write_text(json.dumps(row) + "\n")
    assert ablation.run(arm) == [row]
    others = [
        (ablation, {"an arm": ["seed=2"]}, "recipe.seed was 1, now 2"),
        (replace(ablation, data="shapes:count=50"), arm, "data was shapes:count=40, now shapes:count=50"),
        (replace(ablation, budget="1m"), arm, "budget was None, now 1m"),
        (replace(ablation, prompts=2), arm, "prompts was 0, now 2"),
        (replace(ablation, base=None), arm, f"base was {base / 'run'}, now None"),
        (replace(ablation, common=["dalle.layers=1"]), arm, "recipe.dalle.layers was 2, now 1"),
    ]
    for other, arms, changed in others:
        with pytest.raises(ValueError, match=re.escape(f"({changed}): choose another --out, or give the arm another")):
            other.run(arms)
    recipe.write_text(recipe.read_text().replace("layers = 2", "layers = 3"))
    with pytest.raises(ValueError, match=r"recipe\.dalle\.layers was 2, now 3"):
        ablation.run(arm)


def test_a_result_of_an_earlier_version_counts_for_what_it_says(base: Path, tmp_path: Path) -> None:
    row = {"arm": "an arm", "settings": ["seed=1"], "budget": "1m", "cores": 1, "dalle_steps": 2}
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    ablation = Ablation(base / "recipe.toml", DATA, tmp_path, budget="1m")
    assert ablation.run({"an arm": ["seed=1"]}) == [row]
    with pytest.raises(ValueError, match=r"settings was \['seed=1'\], now \['seed=2'\]"):
        ablation.run({"an arm": ["seed=2"]})
    with pytest.raises(ValueError, match=r"budget was 1m, now 2m"):
        replace(ablation, budget="2m").run({"an arm": ["seed=1"]})
    own = base / "recipe.toml"
    with pytest.raises(ValueError, match=r"own recipe was None, now .*recipe\.toml"):
        replace(ablation, recipes={"an arm": own}).run({"an arm": ["seed=1"]})


def test_a_command_that_fails_is_one_clear_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.toml").write_text('[arms]\n"as it is" = []\n')
    with pytest.raises(typer.Exit) as ended:
        ablate(tmp_path / "plan.toml", base / "recipe.toml", "no-such-folder", tmp_path / "out")
    assert ended.value.exit_code == 1
    log = tmp_path / "out" / "as_it_is.log"
    assert capsys.readouterr().err == f"error: train failed with exit status 2; its last words are in {log}\n"
    assert "no-such-folder" in log.read_text()


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
    (tmp_path / "plan.toml").unlink()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "does not exist" in done.stderr and "Traceback" not in done.stderr


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    """An ablation that was killed while it wrote ended in "Unterminated string", without a word of where."""
    (tmp_path / "results.jsonl").write_text('{"arm": "a", "settings": []}\n{"arm": "b", "set')
    ablation = Ablation(CONFIGS / "shapes.toml", DATA, tmp_path)
    for read in (lambda: ablation.run({"b": []}), lambda: read_runs(tmp_path)):
        with pytest.raises(ValueError, match=r"results\.jsonl, line 2 is damaged .*: delete it"):
            read()
