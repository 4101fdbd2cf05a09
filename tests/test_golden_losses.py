"""Twenty steps of each stage cost what they cost when the numbers were written down.

The tolerance leaves room for other processors; a change of the mathematics goes far beyond it. Where a change is meant:
`python -m tests.test_golden_losses`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch

from dalle_mini_impl.config import Recipe
from dalle_mini_impl.training import loop, muon
from dalle_mini_impl.training.run import train
from dalle_mini_impl.training.stages import ORDER
from tests.tiny import tiny_recipe

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = GOLDEN / "losses.json"
DATA = "shapes:count=60"
NAMES = ("loss", "grad_norm")


def recipe() -> Recipe:
    """AdamW in two stages, Muon in the last."""
    quick = ["steps=20", "batch_size=8", "evaluations=1", "warmup_steps=5", "precision=fp32"]
    settings = [f"train.{stage}.{value}" for stage in ORDER for value in quick]
    optimizers = [
        f"train.{stage}.optimizer={kind}" for stage, kind in zip(ORDER, ("adamw", "adamw", "muon"), strict=True)
    ]
    return tiny_recipe(*settings, *optimizers, "dalle.reading_share=0.25", "clip.hard_negatives=1")


def measured(out: Path) -> dict[str, dict[str, list[float]]]:
    """Loss and gradient norm of each step of each stage, all in fp32: Muon makes much of what bf16 rounds away.

    What follows the VAE takes one from a file: with that of the first stage, two processors' rounding gives a few cells
    other codes, and these pictures another loss.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 1)
        patch.setattr(muon, "computes_bf16", lambda device: False)
        assert train(recipe(), DATA, out / "first", stages=ORDER[:1])
        assert train(recipe(), DATA, out / "later", stages=ORDER[1:], init_from=f"{GOLDEN / 'checkpoint'}:vae")
    logs = [out / part / "metrics.jsonl" for part in ("first", "later")]
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    steps = {stage: [line for line in lines if line["stage"] == stage and "grad_norm" in line] for stage in ORDER}
    return {stage: {name: [line[name] for line in steps[stage]] for name in NAMES} for stage in ORDER}


def test_twenty_steps_of_each_stage_have_the_losses_that_were_written_down(tmp_path: Path) -> None:
    found, expected = measured(tmp_path / "run"), json.loads(EXPECTED.read_text())
    for stage in ORDER:
        assert len(found[stage]["loss"]) == 20
        for name, first, later in (("loss", 1e-4, 1e-2), ("grad_norm", 1e-3, 5e-2)):
            ours, theirs = found[stage][name], expected[stage][name]
            assert ours[0] == pytest.approx(theirs[0], rel=first), (stage, name)
            assert ours == pytest.approx(theirs, rel=later), (stage, name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        facts = measured(Path(folder) / "run")
    rounded = {stage: {name: [round(x, 6) for x in row] for name, row in part.items()} for stage, part in facts.items()}
    EXPECTED.write_text(json.dumps(rounded, indent=1) + "\n")
