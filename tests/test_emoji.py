"""Emoji: names read like names, every picture shows what its captions say, held-out pairs stay out of training."""

from __future__ import annotations

import random
import sys
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest

from dalle_mini_impl.data import emoji_font
from dalle_mini_impl.data.emoji import (
    BACKGROUNDS,
    CELL_PIXELS,
    SCENE_EMOJI,
    EmojiScene,
    EmojiSource,
    Placed,
    cells_of,
    is_held_out,
    render,
)
from dalle_mini_impl.data.emoji_font import draw_cell, find_font
from dalle_mini_impl.data.emoji_names import Glyph, all_glyphs, clean_name, with_article


def has_font() -> bool:
    try:
        find_font()
    except ValueError:
        return False
    return True


needs_font = pytest.mark.skipif(not has_font(), reason="no colour-emoji font is installed")


@pytest.mark.parametrize(
    ("code", "sequence", "name"),
    [
        (":red_apple:", "🍎", "red apple"),
        (":face_with_crossed-out_eyes:", "😵", "face with crossed-out eyes"),
        (":two_o’clock:", "🕑", "two o'clock"),
        (":waving_hand_medium-dark_skin_tone:", "👋🏾", "waving hand: medium-dark skin tone"),
        (":woman_light_skin_tone_red_hair:", "👩🏻‍🦰", "woman: red hair, light skin tone"),
        (":women_holding_hands_light_skin_tone_dark_skin_tone:", "👩🏻‍🤝‍👩🏿",
         "women holding hands: light skin tone, dark skin tone"),
        (":family_man_woman_boy:", "👨‍👩‍👦", "family: man, woman, boy"),
        (":kiss_mark:", "💋", "kiss mark"),
        (":France:", "🇫🇷", "flag: France"),
        (":keycap_7:", "7️⃣", "keycap: 7"),
    ],
)  # fmt: skip
def test_names_keep_hyphens_and_say_tones_apart(code: str, sequence: str, name: str) -> None:
    assert clean_name(code, sequence) == name


@pytest.mark.parametrize(
    "phrase",
    [
        "a frog", "an octopus", "a unicorn", "an hourglass done", "an onion", "a walrus", "a slice of pizza",
        "a one-piece swimsuit", "grapes", "glasses", "fire", "Saturn", "flag: France", "two o'clock",
    ],
)  # fmt: skip
def test_articles_are_those_of_english(phrase: str) -> None:
    name = phrase.removeprefix("an ").removeprefix("a ")
    assert with_article(name) == phrase


def test_no_two_glyphs_share_a_name_or_an_alias() -> None:
    glyphs = all_glyphs()
    names = [name.lower() for glyph in glyphs for name in (glyph.name, *glyph.aliases)]
    assert len(glyphs) > 3500 and len(names) == len(set(names))


def test_scenes_are_composed_of_different_known_emoji() -> None:
    known = {glyph.sequence.rstrip("\ufe0f") for glyph in all_glyphs()}
    assert len(set(SCENE_EMOJI)) == len(SCENE_EMOJI) and set(SCENE_EMOJI) <= known


def test_a_missing_font_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.ttf"):
        find_font(tmp_path / "nothing.ttf")
    monkeypatch.setattr(emoji_font, "FOLDERS", (str(tmp_path),))
    monkeypatch.setattr(emoji_font.shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match="fonts-noto-color-emoji"):
        find_font()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "NotoColorEmoji.ttf").touch()
    assert find_font() == tmp_path / "deep" / "NotoColorEmoji.ttf"


def test_a_font_without_bitmaps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    with pytest.raises(ValueError, match=r"broken\.ttf can't be used"):
        draw_cell(tmp_path / "broken.ttf", "🍎")


@needs_font
def test_missing_glyphs_and_sequences_of_several_are_left_out() -> None:
    font = find_font()
    assert draw_cell(font, "🍎") is not None
    assert draw_cell(font, "\U0003fffe") is None, "an unassigned code point"
    assert draw_cell(font, "🍎🍏") is None, "two glyphs side by side"
    assert draw_cell(font, " ") is None, "no ink"


@pytest.fixture(scope="module")
def source() -> EmojiSource:
    return EmojiSource(scenes=1200, image_size=32, repeats=2)


@needs_font
def test_every_glyph_is_in_training(source: EmojiSource) -> None:
    records = list(source)
    assert len(records) == len(source)
    trained = {caption for record in records if record.split == "train" for caption in record.captions}
    assert len(source.base) > 1500 and {glyph.name for glyph in source.base} <= trained
    assert {glyph.name for glyph in source.toned} <= trained
    assert len(source.actors) > 190
    assert len(set(record.name for record in records)) == len(records)


@needs_font
def test_no_pair_of_validation_meets_in_training(source: EmojiSource) -> None:
    pairs: dict[bool, set[frozenset[str]]] = {True: set(), False: set()}
    for index in range(1200):
        scene, _ = source.composed(random.Random(f"emoji/0/scene/{index}"))
        held_out = is_held_out(scene)
        if held_out and len(scene.placed) > 2:
            continue  # its other pairs may well be in training
        names = (item.glyph.sequence for item in scene.placed)
        pairs[held_out] |= {frozenset(pair) for pair in combinations(names, 2)}
    assert pairs[True] and not pairs[True] & pairs[False]
    splits = [record.split for record in source if record.name.startswith("emoji/scene/")]
    assert 20 < splits.count("validation") < 150


@needs_font
def test_pictures_depend_on_seed_and_number_alone(source: EmojiSource) -> None:
    fewer, other = (EmojiSource(scenes=5, seed=seed, image_size=32, repeats=0) for seed in (0, 1))
    scenes = [record for record in source if record.name.startswith("emoji/scene/")]
    for one, two, three in zip(fewer, scenes, other, strict=False):
        assert (one.name, one.captions, one.load().tobytes()) == (two.name, two.captions, two.load().tobytes())
        assert one.load().tobytes() != three.load().tobytes()
    assert len(list(fewer)) == 5


@needs_font
def test_captions_say_where_things_are_drawn(source: EmojiSource) -> None:
    checked = 0
    for index in range(200):
        scene, captions = source.composed(random.Random(index))
        for caption in captions:
            if len(scene.placed) != 2 or " to the left of " not in caption:
                continue
            left, _, right = caption.partition(" to the left of ")
            first, second = scene.placed
            assert first.x + first.size <= second.x
            assert with_article(first.glyph.name) == left and right.startswith(with_article(second.glyph.name))
            checked += 1
        if scene.background != "white":
            assert all(f"{scene.background} background" in caption for caption in captions)
        middle = scene.cells / 2
        if not any(item.y == 0 and item.x < middle < item.x + item.size for item in scene.placed):
            assert render(scene, source.font, 64).getpixel((32, 1)) == BACKGROUNDS[scene.background]
    assert checked > 10


@needs_font
@pytest.mark.parametrize("image_size", [32, 64, 80, 128, 256, 100])
def test_glyphs_stand_on_a_grid_of_cells(source: EmojiSource, image_size: int) -> None:
    cells = cells_of(image_size)
    assert cells % 2 == 0 and (image_size % (2 * CELL_PIXELS) or image_size % cells == 0)
    frog = next(glyph for glyph in source.actors if glyph.name == "frog")
    pitch, half = image_size / cells, cells // 2
    corners = []
    for x, y in [(0, 0), (1, 0), (0, half), (half, half), (half // 2, 1)]:
        picture = render(EmojiScene((Placed(frog, x, y, half),), cells), source.font, image_size)
        left, top = round(x * pitch), round(y * pitch)
        corners.append(picture.crop((left, top, left + round(half * pitch), top + round(half * pitch))).tobytes())
    assert len(set(corners)) == 1, "the same pixels wherever it stands"


@needs_font
def test_no_glyph_leaves_the_picture_or_meets_another() -> None:
    for image_size in (32, 64, 80):
        source = EmojiSource(scenes=1, image_size=image_size, repeats=0)
        for index in range(300):
            scene, _ = source.composed(random.Random(index))
            covered = [
                (column, row)
                for item in scene.placed
                for column in range(item.x, item.x + item.size)
                for row in range(item.y, item.y + item.size)
            ]
            assert len(set(covered)) == len(covered)
            assert all(0 <= place < scene.cells for cell in covered for place in cell)


@needs_font
def test_glyphs_fill_their_picture_and_leave_a_margin(source: EmojiSource) -> None:
    for record in islice(source, 0, 400, 20):
        picture = np.asarray(record.load()).astype(int)
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (abs(border - border[0]).max(axis=1) < 40).mean() > 0.9, record.name
        assert (abs(picture - border[0]).max(axis=2) > 40).mean() > 0.05, record.name


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "emoji", None)
    with pytest.raises(ValueError, match=r"dalle-mini-impl\[emoji\]"):
        all_glyphs()


@needs_font
def test_black_things_are_never_drawn_on_black(source: EmojiSource) -> None:
    black_heart = next(glyph for glyph in source.actors if glyph.name == "black heart")
    assert black_heart.sequence in source.dark
    scenes = [source.composed(random.Random(index))[0] for index in range(600)]
    on_black = [item.glyph.name for scene in scenes if scene.background == "black" for item in scene.placed]
    assert len(on_black) > 20 and "black heart" not in on_black


@pytest.mark.parametrize("arguments", [{"scenes": -1}, {"scenes": 0, "repeats": 0}, {"image_size": 16}])
def test_impossible_arguments_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="emoji"):
        EmojiSource(**arguments)  # type: ignore[arg-type]


def test_a_toned_glyph_knows_it() -> None:
    assert Glyph("👋🏾", "waving hand: medium-dark skin tone").toned and not Glyph("👋", "waving hand").toned
    assert Glyph("🇫🇷", "flag: France").is_flag and not Glyph("🏳️", "white flag").is_flag
