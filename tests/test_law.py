"""The law of size and time: found again where it holds, honest about what it wasn't shown."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dalle_mini_impl.bench import law as module
from dalle_mini_impl.bench.law import FEWEST_RUNS, Law, SizedRun, fit, left_out, num_parameters, read_runs
from dalle_mini_impl.bench.plan import arm_folder, read_plan
from dalle_mini_impl.config import DALLEConfig, Recipe
from dalle_mini_impl.data.survey import Survey
from dalle_mini_impl.training.presets import Hardware, choose
from tests.tiny import tiny_recipe

TRUE = Law(
    floor=0.7,
    size_weight=0.1,
    size_power=0.5,
    token_weight=0.8,
    token_power=0.35,
    sec_per_mega_token=40.0,
    sec_per_mega_token_and_mega_parameter=60.0,
)
ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"


def _runs(law: Law = TRUE) -> list[SizedRun]:
    runs = []
    for size, tokens in product((0.4e6, 1.2e6, 2.7e6, 4.7e6), (1e6, 4e6, 12e6)):
        each = law.sec_per_mega_token + law.sec_per_mega_token_and_mega_parameter * size / 1e6
        runs.append(SizedRun(f"{size:.0f} {tokens:.0f}", size, tokens, law.nll(size, tokens), each * tokens / 1e6))
    return runs


def test_a_law_is_found_again_in_runs_that_follow_it() -> None:
    law = fit(_runs())
    assert law.size_power == pytest.approx(0.5) and law.token_power == pytest.approx(0.35)
    for size, tokens in ((0.2e6, 1e7), (2e7, 1e9)):
        assert law.nll(size, tokens) == pytest.approx(TRUE.nll(size, tokens), abs=1e-4), "far from all runs"
    assert law.tokens_in(2e6, 600) == pytest.approx(600 / 160 * 1e6, rel=1e-6)
    assert left_out(_runs()) == pytest.approx([run.nll for run in _runs()], abs=1e-4)


def test_what_does_not_follow_the_law_shows_in_what_the_others_say() -> None:
    runs = _runs()
    odd = runs[5]
    runs[5] = SizedRun(odd.name, odd.parameters, odd.tokens, odd.nll + 0.1, odd.core_sec)
    assert left_out(runs)[5] == pytest.approx(odd.nll, abs=0.01)


def test_no_constant_is_below_nought() -> None:
    rising = [SizedRun(run.name, run.parameters, run.tokens, 3.0 - run.nll, run.core_sec) for run in _runs()]
    law = fit(rising)
    assert min(law.floor, law.size_weight, law.token_weight) >= 0


def test_the_best_size_has_the_least_loss_and_grows_with_time() -> None:
    sizes = [TRUE.best_size(sec) for sec in (300, 3_000, 30_000)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]
    for sec, best in zip((300, 3_000, 30_000), sizes, strict=True):
        losses = {size: TRUE.nll(size, TRUE.tokens_in(size, sec)) for size in (best / 2, best, best * 2)}
        assert min(losses, key=lambda size: losses[size]) == best


def test_parameters_are_those_of_the_matrices() -> None:
    assert num_parameters(DALLEConfig(dim=192, layers=6, heads=3)) == 12 * 6 * 192**2
    swiglu = DALLEConfig.model_validate({"dim": 64, "layers": 2, "heads": 1, "ffn": "swiglu", "ffn_multiple": 2.0})
    assert num_parameters(swiglu) == 2 * (4 + 6) * 64**2


def test_too_few_or_too_like_runs_are_refused() -> None:
    with pytest.raises(ValueError, match=f"2 runs can't tell a law of 5 constants: train at least {FEWEST_RUNS}"):
        fit(_runs()[:2])
    alike = [run for run in _runs() if run.parameters == 0.4e6] * 2
    with pytest.raises(ValueError, match="all runs are of one size or one length"):
        fit(alike)


def _ablation(folder: Path) -> Path:
    """The results of an ablation of tiny recipes, with losses by TRUE."""
    folder.mkdir()
    lines: list[dict[str, object]] = [{"arm": "of the VAE", "vae_psnr": 20.0}]
    for dim, steps in product((16, 32, 64), (100, 400, 900)):
        name = f"d {dim}, {steps} steps"
        recipe = tiny_recipe(f"dalle.dim={dim}", "dalle.heads=1")
        run = arm_folder(folder, name)
        run.mkdir()
        (run / "recipe.toml").write_text(recipe.to_toml())
        tokens = steps * recipe.train.dalle.batch_size * recipe.grid_size**2
        nll = TRUE.nll(num_parameters(recipe.dalle), tokens)
        lines.append({"arm": name, "cores": 2, "dalle_steps": steps, "dalle_sec": steps / 10, "dalle_image_nll": nll})
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_an_ablation_is_read_fitted_and_shown(tmp_path: Path) -> None:
    folder = _ablation(tmp_path / "sizes")
    runs = read_runs(folder)
    assert len(runs) == 9 and runs[0].core_sec == 20 and runs[0].name == "d 16, 100 steps"
    shown = CliRunner().invoke(_app(), [str(folder), "--times", "5m,2h"])
    assert shown.exit_code == 0, shown.output
    assert f"{runs[0].nll:.3f} | {runs[0].nll:.3f} | " in shown.output and "| 5m00s | " in shown.output
    refused = CliRunner().invoke(_app(), [str(tmp_path)])
    assert refused.exit_code == 2 and "name the --out folder of an ablation" in refused.output


def _app() -> module.typer.Typer:
    app = module.typer.Typer()
    app.command()(module.main)
    return app


def test_the_plan_of_sizes_differs_in_both() -> None:
    base = CONFIGS / "shapes.toml"
    recipes = [Recipe.from_toml(base, settings) for settings in read_plan(CONFIGS / "ablations" / "size.toml").values()]
    assert len(recipes) > FEWEST_RUNS
    assert len({num_parameters(recipe.dalle) for recipe in recipes}) == 4
    assert len({recipe.train.dalle.steps for recipe in recipes}) == 8


def _published() -> Law:
    """The law that docs/experiments.md prints, the source of the presets' sizes."""
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    number = r"([\d.]+)"
    loss = rf"nats a token = {number} \+ {number} / N\^{number} \+ {number} / D\^{number} for N million"
    found = re.search(rf"{loss}.* a million tokens take {number} \+ {number} × N seconds of one core", text)
    assert found is not None
    return Law(*map(float, found.groups()))


@pytest.mark.parametrize(
    ("minutes", "nats"), [(3, 0.02), (5, 0.001), (15, 0.04), (30, 0.01), (120, 0.01), (480, 0.01), (1000, 0.01)]
)
def test_presets_take_sizes_that_the_law_finds_hardly_worse_than_the_best(minutes: int, nats: float) -> None:
    """Sizes are few, so that between two of them the nearest costs a little; a coarser ladder would cost a lot."""
    law = _published()
    for cores in (1, 2):
        budget_sec = 60.0 * minutes / cores
        recipe = Recipe.parse(
            choose(Survey(50_000, True, 500.0, False, None), Hardware("cpu", 1, cores), budget_sec).values
        )
        shares = {stage: getattr(recipe.train, stage).budget_share for stage in recipe.train.stages}
        core_sec = 60.0 * minutes * shares["dalle"] / sum(shares.values())
        chosen, best = num_parameters(recipe.dalle), law.best_size(core_sec)
        losses = [law.nll(size, law.tokens_in(size, core_sec)) for size in (chosen, best)]
        assert losses[0] < losses[1] + nats, f"{chosen:,.0f} parameters instead of {best:,.0f}"


def test_the_table_of_best_sizes_is_the_laws() -> None:
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) (min|h) \| ([\d.]+) M \| (\d+) M \| ([\d.]+) \|$", text, re.MULTILINE)
    assert len(rows) == 4
    law = _published()
    for time, unit, size, tokens, nats in rows:
        core_sec = int(time) * {"min": 60, "h": 3600}[unit]
        best = law.best_size(core_sec)
        assert best / 1e6 == pytest.approx(float(size), rel=0.03)
        assert law.tokens_in(best, core_sec) / 1e6 == pytest.approx(int(tokens), abs=1)
        assert law.nll(best, law.tokens_in(best, core_sec)) == pytest.approx(float(nats), abs=0.002)
