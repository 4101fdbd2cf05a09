"""Faults of written pictures that are forbidden here: prompts as raw file names, lost settings, cut sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_mini_impl.sheet import (
    CELL_PX,
    PADDING_PX,
    contact_sheet,
    read_metadata,
    reconstruction_sheet,
    save_png,
    slug,
    to_pil,
)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A red heart!", "a-red-heart"),
        ("../../etc/passwd\0", "etc-passwd"),
        ("C:\\x|y?*", "c-x-y"),
        ("коты и قطط", "коты-и-قطط"),
        ("🙂", "prompt"),
        ("", "prompt"),
        ("x" * 10_000, "x" * 60),
    ],
)
def test_a_prompt_is_never_a_file_name_as_it_stands(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


def test_long_names_are_cut_between_characters() -> None:
    name = slug("é" * 100)
    assert name == "é" * 30
    assert len(name.encode()) == 60


def test_settings_travel_inside_the_png(tmp_path: Path) -> None:
    metadata = {"prompt": "قطط 🙂\n猫", "seed": 3, "settings": {"top_p": 0.95}, "clip_score": None, "tokens": [1, 2]}
    save_png(Image.new("RGB", (4, 4), "red"), tmp_path / "x.png", metadata)
    assert read_metadata(tmp_path / "x.png") == metadata
    with Image.open(tmp_path / "x.png") as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_a_foreign_png_has_no_settings(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png carries no settings"):
        read_metadata(tmp_path / "x.png")


def test_pictures_come_out_in_the_range_they_went_in() -> None:
    images = torch.tensor([-0.2, 0.0, 0.5, 1.0, 1.3])[:, None, None, None].expand(5, 3, 2, 2)
    assert [image.getpixel((0, 0))[0] for image in to_pil(images)] == [0, 0, 128, 255, 255]  # type: ignore[index]
    with pytest.raises(ValueError, match=r"shape \(3, 2, 2\)"):
        to_pil(images[0])


def test_a_sheet_holds_every_picture() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (300, 150), "blue")
    sheet = contact_sheet([("first", [(red, "1")] * 3), ("second " * 100, [(blue, "")] * 5)], columns=4)
    assert sheet.width == PADDING_PX + 4 * (CELL_PX + PADDING_PX)
    colours = {colour: count for count, colour in sheet.getcolors(1 << 20) or []}
    assert colours[(255, 0, 0)] == 3 * CELL_PX**2
    assert colours[(0, 0, 255)] == 5 * CELL_PX * CELL_PX // 2


def test_an_empty_sheet_is_a_picture_too() -> None:
    assert contact_sheet([]).size[1] > 0
    assert contact_sheet([("nothing", [])]).size[1] > 0
    with pytest.raises(ValueError, match="1 column"):
        contact_sheet([], columns=0)


def test_reconstructions_stand_under_their_originals() -> None:
    sheet = reconstruction_sheet(torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8), columns=2)
    black = [y for y in range(sheet.height) if sheet.getpixel((PADDING_PX + CELL_PX // 2, y)) == (0, 0, 0)]
    assert len(black) == 2 * CELL_PX, "two lines of originals"
    assert black[-1] - black[0] > 3 * CELL_PX, "with a line of reconstructions between them"
    with pytest.raises(ValueError, match="don't match"):
        reconstruction_sheet(torch.zeros(3, 3, 8, 8), torch.zeros(2, 3, 8, 8))


def test_many_rows_do_not_make_a_ribbon() -> None:
    red = Image.new("RGB", (8, 8), "red")
    rows = [(f"prompt {number}", [(red, "0.5")] * 4) for number in range(30)]
    sheet = contact_sheet(rows)
    assert 0.5 * sheet.width < sheet.height < 2 * sheet.width
    pixels = np.asarray(sheet)
    assert (pixels == (255, 0, 0)).all(axis=2).sum() == 30 * 4 * CELL_PX**2, "every picture is there once"
    one = contact_sheet(rows[:4])
    assert one.width == contact_sheet(rows[:1]).width, "a few rows stand below each other"
