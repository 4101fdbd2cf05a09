"""A checkpoint written by an earlier version loads in this one and draws the same pictures.

`tests/golden/` is a tiny model with random weights. Write it anew only where a format changes on purpose:
`python -m tests.test_golden`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dalle_mini_impl.pipeline import TextToImage
from dalle_mini_impl.pretrained import save_bundle
from tests.tiny import TINY_CAPTIONS, tiny_bundle

FOLDER = Path(__file__).parent / "golden"
CHECKPOINT, EXPECTED = FOLDER / "checkpoint", FOLDER / "expected.json"


def drawn() -> dict[str, Any]:
    """What the golden checkpoint draws: tokens, scores and a few pixels of each prompt's pictures."""
    model = TextToImage.from_pretrained(CHECKPOINT)
    facts: dict[str, Any] = {}
    for prompt in TINY_CAPTIONS:
        ranked = model.draw([prompt], candidates=2, keep=2, seed=3, settings=model.settings(precision="fp32"))[0]
        pictures = sorted(ranked, key=lambda picture: picture.candidate)
        facts[prompt] = [
            {
                "tokens": picture.tokens.tolist(),
                "clip_score": picture.clip_score,
                "log_ratio": picture.log_ratio,
                "pixels": [list(picture.image.getpixel((x, x))) for x in (0, 5, 15)],  # type: ignore[arg-type]
            }
            for picture in pictures
        ]
    return facts


def test_an_earlier_checkpoint_draws_what_it_drew() -> None:
    expected = json.loads(EXPECTED.read_text())
    found = drawn()
    assert found.keys() == expected.keys()
    for prompt in expected:
        for ours, theirs in zip(found[prompt], expected[prompt], strict=True):
            assert ours["tokens"] == theirs["tokens"]
            assert ours["clip_score"] == pytest.approx(theirs["clip_score"], abs=1e-4)
            assert ours["log_ratio"] == pytest.approx(theirs["log_ratio"], abs=1e-2)
            difference = torch.tensor(ours["pixels"]) - torch.tensor(theirs["pixels"])
            assert difference.abs().max() <= 2


@pytest.mark.parametrize("stage", ["vae", "clip", "dalle"])
def test_loading_and_saving_it_changes_no_weight(stage: str, tmp_path: Path) -> None:
    saved = save_bundle(TextToImage.from_pretrained(CHECKPOINT).bundle, tmp_path / "again")
    before, after = (load_file(folder / f"{stage}.safetensors") for folder in (CHECKPOINT, saved))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


if __name__ == "__main__":
    save_bundle(tiny_bundle(seed=7), CHECKPOINT)
    EXPECTED.write_text(json.dumps(drawn(), indent=1) + "\n")
