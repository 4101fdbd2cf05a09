"""Evaluation: the shares are those of the pictures, whatever draws them; the command writes what it prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle_mini_impl.cli.evaluate import evaluate
from dalle_mini_impl.data.checker import read_scene
from dalle_mini_impl.data.scenes import COLOURS, SHAPES, Exists, Scene, render
from dalle_mini_impl.data.shape_captions import parse_caption
from dalle_mini_impl.data.shapes import held_out_scenes
from dalle_mini_impl.embed import Pictures
from dalle_mini_impl.evaluate import Share, evaluate_shapes, vae_ceiling
from dalle_mini_impl.evaluate_clip import evaluate_clip
from tests.tiny import tiny_checkpoint


@dataclass(frozen=True)
class Drawn:
    image: Image.Image
    candidate: int


class PerfectDrawer:
    """Draws the true picture, as candidate 1 of those prompts that it is told to fail at first."""

    def __init__(self, scenes: dict[str, Scene], fails_first: set[str]) -> None:
        self.scenes, self.fails_first, self.calls = scenes, fails_first, 0

    def draw(
        self, prompts: Sequence[str], candidates: int = 1, keep: int | None = None, seed: int = 0
    ) -> list[list[Drawn]]:
        self.calls += 1
        blank = Image.new("RGB", (64, 64), "white")
        ranked = []
        for prompt in prompts:
            truth, fails = render(self.scenes[prompt]), prompt in self.fails_first
            pictures = [Drawn(blank if fails else truth, 0), Drawn(truth, 1)][:candidates]
            ranked.append(pictures[::-1] if fails else pictures)
        return ranked


class Identity:
    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def encode(self, images: Tensor) -> Tensor:
        return images * self.gain

    def decode(self, ids: Tensor) -> Tensor:
        return ids


def test_shares_are_those_of_the_pictures() -> None:
    seen, unseen = held_out_scenes(40, 0, "seen"), held_out_scenes(40, 0, "unseen")
    scenes = {caption: scene for scene, caption in (*seen, *unseen)}
    failed = {caption for _, caption in unseen[:10]}
    told: list[tuple[int, int]] = []
    drawer = PerfectDrawer(scenes, failed)
    reports = evaluate_shapes(
        drawer, Identity(), 64, num_prompts=40, candidates=2, progress=lambda *at: told.append(at)
    )
    assert reports["seen"].single.right == reports["seen"].single.total == 40
    assert reports["unseen"].single.right == 30
    assert reports["unseen"].best is not None and reports["unseen"].best.right == 40
    assert reports["unseen"].ceiling.share == 1.0
    assert sum(share.total for share in reports["unseen"].by_number.values()) == 40
    assert reports["unseen"].by_claim["number of shapes"].right == 30
    assert drawer.calls == 2, "prompts of a kind are drawn together"
    assert told[-1] == (80, 80) and len(told) == 80


def test_one_candidate_has_no_best() -> None:
    scenes = {caption: scene for kind in ("seen", "unseen") for scene, caption in held_out_scenes(3, 0, kind)}  # type: ignore[arg-type]
    reports = evaluate_shapes(PerfectDrawer(scenes, set()), Identity(), 64, num_prompts=3)
    assert reports["seen"].best is None and reports["seen"].single.share == 1.0


def test_a_vae_that_loses_everything_has_ceiling_zero() -> None:
    scenes = held_out_scenes(5)
    assert vae_ceiling(Identity(), scenes, 64).share == 1.0
    assert vae_ceiling(Identity(gain=0.0), scenes, 64).share == 0.0


def test_intervals_hold_at_both_ends() -> None:
    none, half, every = (Share.wilson(right, 200) for right in (0, 100, 200))
    assert none.low == pytest.approx(0.0) and 0.01 < none.high < 0.03
    assert (half.low, half.high) == pytest.approx((0.4314, 0.5686), abs=1e-3)
    assert every.high == pytest.approx(1.0) and every.low == pytest.approx(1 - none.high)
    with pytest.raises(ValueError, match="at least 1"):
        Share.of([])
    with pytest.raises(ValueError, match="num_prompts is 0"):
        evaluate_shapes(PerfectDrawer({}, set()), Identity(), 64, num_prompts=0)


def test_the_command_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny", "data.image_size=32", "vae.downsample=8")
    before = torch.get_rng_state()
    evaluate(
        checkpoint=str(folder), prompts=2, candidates=2, batch_size=3, guidance=1.5,
        out=tmp_path / "deep" / "result.json", sheet=tmp_path / "sheet.png",
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before), "evaluation must not touch the global generator"
    facts = json.loads((tmp_path / "deep" / "result.json").read_text())
    assert facts["settings"]["guidance"] == 1.5 and facts["num_prompts"] == 2
    assert facts["pairs"]["unseen"]["single"]["total"] == 2 and facts["pairs"]["seen"]["best"] is not None
    assert len(facts["pairs"]["seen"]["prompts"]) == 2
    assert facts["clip"]["seen"]["pictures"]["total"] == 1000 and facts["clip"]["unseen"]["colours"]["total"] == 500
    assert Image.open(tmp_path / "sheet.png").width > 300
    printed = capsys.readouterr().out
    assert "single sample" in printed and "8 pictures in" in printed and "shape of a single shape" in printed


class ColourBlind:
    """A CLIP that sees the true colours and shapes of single shapes, or shapes alone."""

    scale, bias, image_size, name, device = 10.0, 0.0, 64, "blind", torch.device("cpu")

    def __init__(self, *, sees_colours: bool) -> None:
        self.sees_colours, self.module = sees_colours, torch.nn.Identity()

    def _vector(self, things: set[tuple[str, str]]) -> Tensor:
        vector = torch.zeros(len(COLOURS) * len(SHAPES))
        for colour, shape in things:
            for seen in [colour] if self.sees_colours else COLOURS:
                vector[list(COLOURS).index(seen) * len(SHAPES) + SHAPES.index(shape)] += 1  # type: ignore[arg-type]
        return vector / vector.norm()

    def encode_texts(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        claims = [[claim for claim in parse_caption(text) if isinstance(claim, Exists)] for text in texts]
        return torch.stack([self._vector({(claim.colour, claim.shape) for claim in each}) for each in claims])

    def encode_pictures(self, pictures: Pictures, batch_size: int = 64) -> Tensor:
        found = [read_scene(np.asarray(picture)) for picture in pictures]
        return torch.stack(
            [self._vector({(thing.colour, thing.shape or "circle") for thing in scene.things}) for scene in found]
        )

    def encode_image(self, images: Tensor) -> Tensor:
        raise NotImplementedError


def test_a_clip_is_judged_by_what_it_sees() -> None:
    sharp, blind = (
        evaluate_clip(ColourBlind(sees_colours=sees), "seen", 64, num_singles=40, num_captions=30)
        for sees in (True, False)
    )
    assert sharp.colours.share == sharp.shapes.share == 1.0 and sharp.colours.total == 40
    assert blind.shapes.share == 1.0 and blind.colours.share < 0.4
    assert blind.pictures.share < sharp.pictures.share and sharp.pictures.total == 30 == sharp.captions.total
    with pytest.raises(ValueError, match="num_captions 0"):
        evaluate_clip(ColourBlind(sees_colours=True), "seen", 64, num_captions=0)
