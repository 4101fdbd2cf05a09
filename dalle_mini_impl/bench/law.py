"""``python -m dalle_mini_impl.bench.law``: which size of transformer suits how much time, by runs of several sizes.

A transformer of N parameters that has read D picture tokens is held to need E + A / N^p + B / D^q nats a token (arXiv
2203.15556, "Chinchilla"), and to take c + d × N seconds of one core for each. So a time has a best size: a smaller
transformer would say less with more tokens, a larger one see too few. The runs are the arms of an ablation:

    python -m dalle_mini_impl.bench.ablate configs/ablations/size.toml --config configs/shapes.toml \
      --data shapes:count=100000 --base runs/shapes --out runs/sizes --jobs 2 --prompts 0
    python -m dalle_mini_impl.bench.law runs/sizes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from dalle_mini_impl.bench.plan import arm_folder, read_results
from dalle_mini_impl.config import DALLEConfig, Recipe
from dalle_mini_impl.training.budget import format_duration, parse_duration

FEWEST_RUNS = 6
"""One more than the law of the loss has constants."""
_POWERS = np.arange(0.1, 2.01, 0.05)
_SIZES = np.geomspace(1e5, 1e9, 400)
_UNIT = 1e6  # parameters and tokens are counted in millions, so that all constants are of a like size


@dataclass(frozen=True)
class SizedRun:
    """A finished run. parameters: of the transformer's matrices, see `num_parameters`. tokens: of pictures, all that
    it has read. nll: of held-out pictures, nats a token. core_sec: of all cores together, evaluations included.
    """

    name: str
    parameters: float
    tokens: float
    nll: float
    core_sec: float


@dataclass(frozen=True)
class Law:
    """The constants of `nll` and `tokens_in`, for parameters and tokens in millions."""

    floor: float
    size_weight: float
    size_power: float
    token_weight: float
    token_power: float
    sec_per_mega_token: float
    sec_per_mega_token_and_mega_parameter: float

    def nll(self, parameters: float, tokens: float) -> float:
        """Nats a held-out token after so many tokens."""
        by_size = self.size_weight * (parameters / _UNIT) ** -self.size_power
        return float(self.floor + by_size + self.token_weight * (tokens / _UNIT) ** -self.token_power)

    def tokens_in(self, parameters: float, core_sec: float) -> float:
        """Tokens that a transformer of this size reads in so many seconds of one core."""
        each = self.sec_per_mega_token + self.sec_per_mega_token_and_mega_parameter * parameters / _UNIT
        return core_sec / each * _UNIT

    def best_size(self, core_sec: float) -> float:
        """Parameters with the least loss after so many seconds of one core, from 10⁵ to 10⁹."""
        losses = [self.nll(size, self.tokens_in(size, core_sec)) for size in _SIZES]
        return float(_SIZES[int(np.argmin(losses))])


def num_parameters(config: DALLEConfig) -> float:
    """Of the matrices of all blocks, where a transformer's operations are; without embeddings and head."""
    in_ffn = (3 if config.ffn == "swiglu" else 2) * config.ffn_multiple
    return config.layers * (4 + in_ffn) * config.dim**2


def fit(runs: Sequence[SizedRun]) -> Law:
    """The law with the least squared error: powers from a grid, the other constants, none below 0, by least squares.

    Raises ValueError for fewer than FEWEST_RUNS runs, or for runs of one size or of one length.
    """
    if len(runs) < FEWEST_RUNS:
        raise ValueError(f"{len(runs)} runs can't tell a law of 5 constants: train at least {FEWEST_RUNS}")
    sizes = np.array([run.parameters for run in runs]) / _UNIT
    tokens = np.array([run.tokens for run in runs]) / _UNIT
    if len(set(sizes)) < 2 or len(set(tokens)) < 2:
        raise ValueError("all runs are of one size or one length: train arms that differ in both")
    losses = np.array([run.nll for run in runs])
    ones = np.ones_like(sizes)
    best, least = None, np.inf
    for size_power, token_power in product(_POWERS, _POWERS):
        columns = np.stack([ones, sizes**-size_power, tokens**-token_power], axis=1)
        weights = _least_squares(columns, losses)
        error = float(((columns @ weights - losses) ** 2).sum())
        if error < least:
            least, best = error, (float(size_power), float(token_power), *map(float, weights))
    assert best is not None
    size_power, token_power, floor, size_weight, token_weight = best
    seconds = np.array([run.core_sec for run in runs]) / tokens
    relative = np.stack([ones, sizes], axis=1) / seconds[:, None]  # an error of a per cent counts alike for all
    each, each_size = _least_squares(relative, ones)
    return Law(floor, size_weight, size_power, token_weight, token_power, float(each), float(each_size))


def left_out(runs: Sequence[SizedRun]) -> list[float]:
    """What the law of all others says of each run: nats a token. Raises ValueError as `fit`."""
    others = [[run for place, run in enumerate(runs) if place != index] for index in range(len(runs))]
    return [fit(rest).nll(run.parameters, run.tokens) for run, rest in zip(runs, others, strict=True)]


def _least_squares(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Weights (K,) of columns (n, K), none below 0, with the least squared error, over all subsets of columns."""
    whole: np.ndarray = np.linalg.lstsq(columns, values, rcond=None)[0]
    if (whole >= 0).all():
        return whole
    best, least = np.zeros(columns.shape[1]), float((values**2).sum())
    for used in product((False, True), repeat=columns.shape[1]):
        if not any(used):
            continue
        weights = np.zeros(columns.shape[1])
        weights[list(used)] = np.linalg.lstsq(columns[:, list(used)], values, rcond=None)[0]
        error = float(((columns @ weights - values) ** 2).sum())
        if (weights >= 0).all() and error < least:
            best, least = weights, error
    return best


def read_runs(ablation: Path) -> list[SizedRun]:
    """The arms of an ablation that have trained a transformer; ValueError where there are no results."""
    results = ablation / "results.jsonl"
    if not results.is_file():
        raise ValueError(f"{results} doesn't exist: name the --out folder of an ablation")
    runs = []
    for arm in read_results(results):
        if "dalle_image_nll" not in arm:
            continue
        recipe = Recipe.from_toml(arm_folder(ablation, arm["arm"]) / "recipe.toml")
        tokens = arm["dalle_steps"] * recipe.train.dalle.batch_size * recipe.grid_size**2
        core_sec = arm["dalle_sec"] * arm["cores"]
        runs.append(SizedRun(arm["arm"], num_parameters(recipe.dalle), tokens, arm["dalle_image_nll"], core_sec))
    return runs


def table(runs: Sequence[SizedRun], law: Law, others: Sequence[float] | None) -> str:
    """Measured and fitted, a Markdown row a run; others: what `left_out` says, where there are runs enough."""
    lines = ["| run | parameters | tokens | nats a token | fitted | by the others |", "|---" * 6 + "|"]
    for index, run in enumerate(runs):
        fitted = law.nll(run.parameters, run.tokens)
        blind = "–" if others is None else f"{others[index]:.3f}"
        counts = f"{run.parameters / _UNIT:.2f} M | {run.tokens / _UNIT:.1f} M"
        lines.append(f"| {run.name} | {counts} | {run.nll:.3f} | {fitted:.3f} | {blind} |")
    return "\n".join(lines)


def main(
    ablation: Annotated[Path, typer.Argument(help="The --out folder of an ablation of sizes.")],
    times: Annotated[str, typer.Option(help="Times of one core to name the best size for, as 5m,1h.")] = "5m,30m,2h,8h",
) -> None:
    """Fit the law of size and time to an ablation's runs, show how well it fits, and what it says."""
    try:
        runs = read_runs(ablation)
        law = fit(runs)
        others = left_out(runs) if len(runs) > FEWEST_RUNS else None
        seconds = [parse_duration(time) for time in times.split(",")]
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(table(runs, law, others))
    typer.echo(
        f"\nnats a token = {law.floor:.3f} + {law.size_weight:.3f} / N^{law.size_power:.2f} + "
        f"{law.token_weight:.3f} / D^{law.token_power:.2f}, seconds of one core a million tokens = "
        f"{law.sec_per_mega_token:.1f} + {law.sec_per_mega_token_and_mega_parameter:.1f} × N, N and D in millions\n"
    )
    typer.echo("| time of one core | best size | tokens | nats a token |\n|---|---|---|---|")
    for sec in seconds:
        size = law.best_size(sec)
        tokens = law.tokens_in(size, sec)
        counts = f"{size / _UNIT:.2f} M | {tokens / _UNIT:.0f} M"
        typer.echo(f"| {format_duration(sec)} | {counts} | {law.nll(size, tokens):.3f} |")


if __name__ == "__main__":
    typer.run(main)
