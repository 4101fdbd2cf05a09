"""Twenty steps of each stage cost what they cost when the numbers were written down.

The tolerance leaves room for other processors; a change of the mathematics goes far beyond it. Where a change is meant:
`python -m tests.test_golden_losses`.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.training import loop, muon
from dalle_mini_impl.training.run import train
from tests.tiny import tiny_recipe

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = GOLDEN / "losses.json"
DATA = "shapes:count=60"
NAMES = ("loss", "grad_norm")
QUICK = ("steps=20", "batch_size=8", "evaluations=1", "warmup_steps=5", "precision=fp32")


@dataclass(frozen=True)
class Run:
    """Stages that are trained in one go.

    takes: models of the checkpoint on disk that it starts from, "" for none, ":" for all. What follows a VAE takes that
    one: behind a VAE of its own, two processors' rounding gives a few cells other codes, so that their pictures cost
    something else.
    """

    stages: tuple[Stage, ...]
    takes: str
    overrides: tuple[str, ...] = ()

    def recipe(self) -> Recipe:
        """Twenty steps of each stage in fp32."""
        quick = [f"train.{stage}.{value}" for stage in self.stages for value in QUICK]
        return tiny_recipe(*quick, *self.overrides)


ADAMW = {stage: f"train.{stage}.optimizer=adamw" for stage in ("vae", "clip", "prior", "distill", "vqgan", "upscale")}
ADVERSARY = ("vqgan.alone_steps=5", "vqgan.ramp_steps=5", "vqgan.discriminator_width=4", "vqgan.discriminator_layers=1")
RUNS = {
    "vae": Run(("vae",), "", (ADAMW["vae"],)),
    "clip and dalle": Run(
        ("clip", "dalle"), ":vae", (ADAMW["clip"], "dalle.reading_share=0.25", "clip.hard_negatives=1")
    ),
    "unclip": Run(("prior", "dalle"), ":vae,clip", (ADAMW["prior"], "dalle.image_prefix=1")),
    "distill": Run(("distill",), ":", (ADAMW["distill"],)),
    "vqgan": Run(("vqgan",), ":", (ADAMW["vqgan"], *ADVERSARY)),
    "upscale": Run(("upscale",), ":", (ADAMW["upscale"], "upscale.factor=2", "upscale.width=8", "upscale.blocks=1")),
}

Losses = dict[str, dict[str, list[float]]]


def measured(run: Run, out: Path) -> Losses:
    """Loss and gradient norm of each step of each stage, all in fp32: Muon makes much of what bf16 rounds away."""
    start = f"{GOLDEN / 'checkpoint'}{run.takes.removesuffix(':')}" if run.takes else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 1)
        patch.setattr(muon, "computes_bf16", lambda device: False)
        assert train(run.recipe(), DATA, out, stages=run.stages, init_from=start)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = {stage: [line for line in lines if line["stage"] == stage and "grad_norm" in line] for stage in run.stages}
    return {stage: {name: [line[name] for line in steps[stage]] for name in NAMES} for stage in run.stages}


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_of_each_stage_have_the_losses_that_were_written_down(name: str, tmp_path: Path) -> None:
    found, expected = measured(RUNS[name], tmp_path / "run"), json.loads(EXPECTED.read_text())[name]
    assert found.keys() == expected.keys()
    for stage, ours in found.items():
        theirs = expected[stage]
        assert len(ours["loss"]) == 20
        for value, first, later in (("loss", 1e-4, 1e-2), ("grad_norm", 1e-3, 5e-2)):
            assert ours[value][0] == pytest.approx(theirs[value][0], rel=first), (stage, value)
            assert ours[value] == pytest.approx(theirs[value], rel=later), (stage, value)


def write_down() -> None:
    """Runs all of them and replaces the numbers on disk."""
    facts: dict[str, Losses] = {}
    for name, run in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            losses = measured(run, Path(folder) / "run")
        facts[name] = {
            stage: {value: [round(x, 6) for x in row] for value, row in part.items()} for stage, part in losses.items()
        }
    EXPECTED.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_down()
