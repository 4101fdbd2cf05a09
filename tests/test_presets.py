"""``--preset auto``: what it sees of the data, what it chooses from that, and that the choice is kept."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator
from PIL import Image

from dalle_mini_impl.cli.app import run_verb
from dalle_mini_impl.config import DataConfig, Recipe
from dalle_mini_impl.data.survey import Survey, survey
from dalle_mini_impl.pretrained import load_bundle
from dalle_mini_impl.training import presets
from dalle_mini_impl.training.presets import FP32_SPEED, Hardware, choose, hardware_of

TWO_CORES, ONE_GPU, EIGHT_GPUS = Hardware("cpu", 1, 2), Hardware("gpu", 1, 16), Hardware("gpu", 8, 96)
ALL_HARDWARE = [TWO_CORES, Hardware("cpu", 2, 2), Hardware("cpu", 1, 16), ONE_GPU, EIGHT_GPUS]
BUDGETS = [60.0, 1500.0, 7200.0, 36_000.0, None]


def photos(count: int, side: float | None = 500.0, names_sides: bool = False, made: str | None = None) -> Survey:
    return Survey(count, True, side, names_sides, made)


def chosen(data: Survey, hardware: Hardware, budget_sec: float | None = None) -> Recipe:
    return Recipe.parse(choose(data, hardware, budget_sec).values)


@pytest.mark.parametrize("hardware", ALL_HARDWARE, ids=str)
@pytest.mark.parametrize("count", [1, 30, 500, 5_000, 50_000, 10_000_000])
def test_every_choice_is_a_recipe_that_its_processes_can_share(count: int, hardware: Hardware) -> None:
    for budget_sec, side, names_sides in itertools.product(BUDGETS, (20.0, 70.0, 4000.0, None), (True, False)):
        choice = choose(photos(count, side, names_sides), hardware, budget_sec)
        recipe = Recipe.parse(choice.values)
        stages = [getattr(recipe.train, stage) for stage in recipe.train.stages]
        assert all(stage.batch_size % hardware.processes == 0 for stage in stages)
        assert len(choice.reasons) >= 6
        assert all("\n" not in reason and len(reason) < 140 for reason in choice.reasons)


@pytest.mark.parametrize("hardware", [TWO_CORES, ONE_GPU, EIGHT_GPUS], ids=str)
def test_a_longer_budget_never_means_a_smaller_model(hardware: Hardware) -> None:
    recipes = [chosen(photos(60_000), hardware, minutes * 60.0) for minutes in (2, 10, 25, 60, 130, 1200)]
    sizes = [recipe.dalle.dim**2 * recipe.dalle.layers for recipe in recipes]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_a_cpu_without_bf16_gets_the_size_that_less_time_would_get() -> None:
    slower = replace(TWO_CORES, has_bf16=False)
    for minutes in (5, 25, 120, 600):
        own = choose(photos(60_000), slower, minutes * 60.0)
        same = choose(photos(60_000), TWO_CORES, minutes * 60.0 * FP32_SPEED)
        assert own.values["dalle"] == same.values["dalle"]
        assert any("2 cores without bf16" in reason for reason in own.reasons)
    assert not any("without" in reason for reason in choose(photos(60_000), TWO_CORES, 600.0).reasons)


@pytest.mark.parametrize("has_bf16", [False, True])
def test_the_hardware_is_asked_whether_it_computes_bf16(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "computes_bf16", lambda device: has_bf16)
    assert hardware_of(Accelerator(cpu=True)).has_bf16 == has_bf16


def test_what_was_measured_to_be_good_is_chosen() -> None:
    shapes = chosen(photos(50_000, None, True, "shapes"), TWO_CORES, 1500.0)
    ours = Recipe.from_toml(Path(__file__).parents[1] / "configs" / "shapes.toml")
    assert all(
        getattr(shapes.dalle, key) == getattr(ours.dalle, key)
        for key in ("dim", "layers", "heads", "neighbours", "look_ahead", "soft_targets", "code_features")
    )
    assert shapes.data.image_size == ours.data.image_size and shapes.grid_size == ours.grid_size
    assert (shapes.clip.stem_width, shapes.train.clip.muon_learning_rate) == (64, 0.01)
    assert (shapes.dalle.dropout, shapes.data.views) == (0.0, ("plain",))
    emoji = chosen(photos(50_000, None, True, "emoji"), Hardware("cpu", 1, 1), 7500.0)
    assert (emoji.dalle.dim, emoji.dalle.layers, emoji.data.image_size, emoji.grid_size) == (192, 6, 80, 10)


def test_few_pictures_get_what_keeps_them_from_being_learnt_by_heart() -> None:
    few, many = (chosen(photos(count), ONE_GPU, 36_000.0) for count in (500, 50_000))
    assert few.dalle.token_corruption > many.dalle.token_corruption
    assert few.dalle.dim < many.dalle.dim == 768
    assert few.dalle.dropout == 0.1
    assert few.train.clip.batch_size < 500 / 2


def test_dropout_never_keeps_a_cpu_from_its_compiled_attention() -> None:
    assert {chosen(photos(count), TWO_CORES).dalle.dropout for count in (500, 5_000, 50_000)} == {0.0}


@pytest.mark.parametrize(
    ("count", "hardware", "minutes", "moves"),
    [
        (500, TWO_CORES, 5, 8),
        (5_000, TWO_CORES, 5, 0),
        (5_000, TWO_CORES, 15, 4),
        (5_000, TWO_CORES, 25, 8),
        (5_000, replace(TWO_CORES, has_bf16=False), 30, 4),
        (50_000, TWO_CORES, 25, 0),
        (50_000, TWO_CORES, 150, 4),
        (50_000, ONE_GPU, 25, 8),
    ],
)
def test_pictures_are_moved_as_often_as_there_is_time_to_encode(
    count: int, hardware: Hardware, minutes: float, moves: int
) -> None:
    for names_sides in (False, True):
        views = chosen(photos(count, names_sides=names_sides), hardware, 60 * minutes).data.views
        assert len([view for view in views if view not in ("plain", "flip")]) == moves
        is_mirrored = not names_sides and not (count == 50_000 and moves == 0)
        assert ("flip" in views) == is_mirrored, "never against its caption"
    assert chosen(photos(count, None, True, "shapes"), hardware, 60 * minutes).data.views == ("plain",)


@pytest.mark.parametrize(("side", "cpu", "gpu"), [(20.0, 32, 32), (64.0, 64, 64), (100.0, 64, 64), (2000.0, 64, 128)])
def test_pictures_are_not_blown_up(side: float, cpu: int, gpu: int) -> None:
    assert chosen(photos(5_000, side), TWO_CORES).data.image_size == cpu
    assert chosen(photos(5_000, side), ONE_GPU).data.image_size == gpu


def test_a_gpu_does_not_spend_its_budget_on_views() -> None:
    """It had ten views of however many pictures: of two million more than an RTX 4090 encodes in ten minutes."""
    short, long = (chosen(photos(2_000_000), EIGHT_GPUS, 60 * minutes).data.views for minutes in (10, 600))
    assert short == ("plain",) and len(long) == 10
    old = replace(ONE_GPU, has_bf16=False)
    assert len(chosen(photos(5_000), old, 300.0).data.views) < len(chosen(photos(5_000), ONE_GPU, 300.0).data.views)


def test_a_side_that_is_asked_for_decides_tokens_and_views() -> None:
    """--set data.image_size=32 left tokens of 8 pixels, 16 a picture; with 128 four times the time went into views."""
    small, large = (Recipe.parse(choose(photos(5_000), TWO_CORES, 1500.0, side).values) for side in (32, 128))
    assert (small.data.image_size, small.vae.downsample, small.grid_size) == (32, 4, 8)
    assert (large.data.image_size, large.vae.downsample) == (128, 8)
    assert len(small.data.views) > len(large.data.views)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    root.mkdir()
    for index in range(30):
        Image.new("RGB", (40 + index, 90), (index * 8, 100, 200)).save(root / f"{index:02d}.png")
        (root / f"{index:02d}.txt").write_text(f"a plain picture number{index}, copyright")
    (root / "07.png").write_bytes(b"no picture")
    return root


def test_a_survey_counts_measures_and_reads(folder: Path) -> None:
    seen = survey(str(folder), DataConfig())
    assert (seen.num_pictures, seen.is_counted, seen.names_sides, seen.made) == (30, True, False, None)
    assert seen.side_px is not None and 45 <= seen.side_px <= 60
    (folder / "20.txt").write_text("A dog on the LEFT of a tree")
    assert survey(str(folder), DataConfig()).names_sides


def test_a_survey_of_made_pictures_takes_them_as_they_are_asked_for() -> None:
    seen = survey("shapes:count=3000", DataConfig())
    assert seen == Survey(3000, True, None, True, "shapes")


def test_a_survey_ends_where_records_come_slowly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_mini_impl.data.survey.LOOK_SEC", -1.0)
    monkeypatch.setattr("dalle_mini_impl.data.survey.COUNT_SEC", -1.0)
    seen = survey(str(folder), DataConfig())
    assert seen.side_px is None
    assert seen.is_counted == (seen.num_pictures == 30)
    assert chosen(seen, TWO_CORES).data.image_size == 64


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        run_verb("train", arguments)
    return exit_.value.code if isinstance(exit_.value.code, int) else 0


def test_without_a_recipe_one_is_chosen_told_and_kept(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    base = ["--data", str(folder), "--out", str(out)]
    steps = ["--set", "train.vae.steps=2", "--set", "train.vae.evaluations=1", "--set", "vae.codebook_size=32"]
    assert run(*base, "--stage", "vae", *steps) == 0
    error = capfd.readouterr().err
    for words in (
        "preset for 500 pictures",
        "pictures of 32 × 32",
        "mirrored pictures, too",
        "--set train.vae.steps=2",
    ):
        assert words in error
    kept = Recipe.from_toml(out / "recipe.toml")
    assert kept == load_bundle(out).recipe
    assert (kept.data.image_size, kept.vae.downsample, kept.vae.codebook_size) == (32, 4, 32)
    assert "# pictures of 32 × 32" in (out / "recipe.toml").read_text(encoding="utf-8")
    asked = ["--set", "data.image_size=48", "--set", "train.vae.batch_size=4"]
    assert run("--data", str(folder), "--out", str(tmp_path / "asked"), "--stage", "vae", *steps, *asked) == 0
    assert "pictures of 48 × 48 pixels, 144 tokens each: as data.image_size asks" in capfd.readouterr().err
    # From now on the run keeps to its own recipe.
    more = ["--set", "train.clip.steps=2", "--set", "train.clip.evaluations=1", "--set", "train.clip.batch_size=4"]
    assert run(*base, "--stage", "clip", "--preset", "auto", *more) == 0
    assert "preset for" not in capfd.readouterr().err
    assert load_bundle(out).recipe.data == kept.data
    assert "pictures of 32" in " ".join(json.loads((out / "run.json").read_text())["reasons"])


def test_a_file_and_a_preset_exclude_each_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = ["--data", "shapes:count=30", "--out", str(tmp_path / "run"), "--config", "configs/shapes.toml"]
    assert run(*base, "--preset", "auto") == 2
    assert "--config and --preset both name a recipe" in capfd.readouterr().err


def test_the_built_in_recipe_is_no_other_runs(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = ["--data", str(folder), "--out", str(tmp_path / "run"), "--stage", "vae", "--preset", "built-in"]
    own = ["--set", "train.vae.steps=1", "--set", "vae.width=8", "--set", "data.image_size=32"]
    assert run(*base, *own) == 0
    assert run(*base, *own) == 0, "the same command goes on"
    assert run(*base) == 2
    assert "holds another run (data.image_size was 32, now 64" in capfd.readouterr().err
