"""The judge of drawn emoji: it names true glyphs right, wherever they come from, and has no model in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle_mini_impl.cli.app import main
from dalle_mini_impl.data.emoji import (
    BACKGROUNDS,
    EmojiScene,
    EmojiSource,
    Placed,
    cells_of,
    is_held_out,
    render,
    survey,
)
from dalle_mini_impl.data.emoji_font import find_font
from dalle_mini_impl.data.emoji_names import with_article
from dalle_mini_impl.data.glyph_judge import GlyphJudge, SceneJudge
from dalle_mini_impl.files import read_json
from tests.test_emoji import needs_font
from tests.tiny import tiny_checkpoint

SIZE = 48


@pytest.fixture(scope="module")
def judge() -> GlyphJudge:
    return GlyphJudge(SIZE)


def drawn(name: str, background: str) -> Tensor:
    font, cells = find_font(None), cells_of(SIZE)
    glyph = next(glyph for glyph in survey(font)[0] if with_article(glyph.name) == name and not glyph.toned)
    picture = render(EmojiScene((Placed(glyph, 0, 0, cells),), cells, background), font, SIZE)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255


@needs_font
def test_true_glyphs_are_right_and_others_are_not(judge: GlyphJudge) -> None:
    names = judge.names[::40]
    for index, name in enumerate(names):
        picture = drawn(name, list(BACKGROUNDS)[index % len(BACKGROUNDS)])
        noisy = (picture + 0.1 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(index))).clamp(0, 1)
        assert judge.grade(name, picture) == judge.grade(name, noisy) == 1.0
        assert judge.grade(names[index - 1], picture) < 1.0


@needs_font
def test_noise_is_graded_by_chance(judge: GlyphJudge) -> None:
    pictures = torch.rand(20, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    grades = [judge.grade(name, picture) for name, picture in zip(judge.names[::10], pictures, strict=False)]
    assert 0.2 < float(np.mean(grades)) < 0.8 and 1.0 not in grades


@needs_font
def test_a_name_that_it_doesnt_know_is_refused(judge: GlyphJudge) -> None:
    with pytest.raises(ValueError, match="'a thing' is no emoji of scenes"):
        judge.grade("a thing", torch.zeros(3, SIZE, SIZE))


@needs_font
def test_the_curve_of_emoji_is_judged_by_their_glyphs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", "dalle.reading_share=0.2")
    options = ["--checkpoint", str(checkpoint), "--num-prompts", "3", "--candidates", "2", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main(["rerank", "--curve", "--prompts-from", "emoji", *options])
    assert not ended.value.code, capsys.readouterr().err
    facts = read_json(tmp_path / "curve.json", "")
    assert facts["num_prompts"] == 3 and "glyph" in facts["judge"]
    assert set(facts["curves"]) == {"clip", "reading", "likelihood", "log_ratio", "clip_reading", "rank", "oracle"}
    with pytest.raises(SystemExit) as ended:
        main(["rerank", "--curve", "--prompts-from", "emoji", "--judge", str(checkpoint), *options])
    assert ended.value.code == 2
    assert "emoji are judged by their glyphs" in capsys.readouterr().err


@pytest.fixture(scope="module")
def scenes() -> list[tuple[EmojiScene, str]]:
    return EmojiSource(image_size=80).held_out_scenes(40)


def picture_of(scene: EmojiScene, size: int = 80) -> Tensor:
    return torch.from_numpy(np.asarray(render(scene, find_font(None), size)).copy()).permute(2, 0, 1).float() / 255


@needs_font
def test_held_out_scenes_say_where_everything_is_and_are_of_no_training(scenes: list[tuple[EmojiScene, str]]) -> None:
    assert {len(scene.placed) for scene, _ in scenes} == {2, 3}
    assert all(is_held_out(scene) for scene, _ in scenes)
    assert not any(" next to " in caption for _, caption in scenes)
    assert scenes == EmojiSource(image_size=80, scenes=5).held_out_scenes(40)
    assert scenes[:5] != EmojiSource(image_size=80).held_out_scenes(5, seed=1)


@needs_font
@pytest.mark.parametrize("size", [64, 80])
def test_true_scenes_hold_and_wrong_ones_dont(size: int) -> None:
    judge = SceneJudge(size)
    drawn = [scene for scene, _ in EmojiSource(image_size=size).held_out_scenes(30, seed=2)]
    for index, scene in enumerate(drawn):
        picture = picture_of(scene, size)
        noise = 0.08 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(index))
        assert judge.holds(scene, picture) and judge.holds(scene, (picture + noise).clamp(0, 1))
        first, second, *others = scene.placed
        swapped = (replace(first, glyph=second.glyph), replace(second, glyph=first.glyph), *others)
        other = next(s for s in drawn if s.placed[0].glyph != first.glyph).placed[0].glyph
        background = "pink" if scene.background != "pink" else "green"
        wrong = [
            replace(scene, placed=swapped),
            replace(scene, placed=(replace(first, glyph=other), second, *others)),
            replace(scene, placed=(first, *others)),
            replace(scene, background=background),
        ]
        assert not any(judge.holds(scene, picture_of(one, size)) for one in wrong)
    two = next(scene for scene in drawn if len(scene.placed) == 2)
    third = Placed(drawn[0].placed[0].glyph, *([0, 0] if two.placed[0].y else [0, judge.cells // 2]), judge.cells // 2)
    assert not judge.holds(two, picture_of(replace(two, placed=(*two.placed, third)), size))


@needs_font
def test_the_curve_of_emoji_scenes(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", "data.image_size=32", "vae.downsample=8")
    options = ["--checkpoint", str(checkpoint), "--num-prompts", "3", "--candidates", "2", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main(["rerank", "--curve", "--prompts-from", "emoji-scenes", *options])
    assert not ended.value.code
    facts = read_json(tmp_path / "curve.json", "")
    assert facts["num_prompts"] == 3 and facts["curves"]["oracle"][0]["mean"] == 0.0
