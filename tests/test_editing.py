"""Which cells of a picture are given, and which are drawn anew."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from dalle_mini_impl.decoding import FREE
from dalle_mini_impl.editing import keep_first, keep_outside, mask_as_seen
from dalle_mini_impl.pipeline import TextToImage
from tests.tiny import tiny_bundle

IDS = torch.arange(16) + 100


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.4, 6), (0.5, 8), (1.0, 16)])
def test_the_first_tokens_are_kept(share: float, count: int) -> None:
    before = IDS.clone()
    known = keep_first(IDS, share)
    assert torch.equal(known[:count], IDS[:count])
    assert (known[count:] == FREE).all()
    assert torch.equal(IDS, before)


def test_a_share_beyond_the_picture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"share to keep is 1\.5; it must be from 0"):
        keep_first(IDS, 1.5)


@pytest.mark.parametrize("size", [(4, 4), (16, 16), (30, 17), (3, 2)])
def test_cells_with_a_bright_pixel_are_drawn_anew(size: tuple[int, int]) -> None:
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 2, 0, size[0], size[1]))
    free = (keep_outside(IDS, mask) == FREE).view(4, 4)
    assert free[:, 3].all() and not free[:, 0].any()
    assert (free == free[0]).all()
    with pytest.raises(ValueError, match="dark everywhere"):
        keep_outside(IDS, Image.new("L", size))


def test_one_bright_pixel_is_enough() -> None:
    mask = Image.new("L", (64, 64))
    mask.putpixel((20, 37), 255)
    assert (keep_outside(IDS, mask) == FREE).nonzero()[:, 0].tolist() == [2 * 4 + 1]


@pytest.mark.parametrize("scale", [1, 3])
def test_a_mask_over_a_photograph_is_cut_as_the_photograph_is(scale: int) -> None:
    photo, mask = Image.new("RGB", (80, 40)), Image.new("L", (80 * scale, 40 * scale))
    mask.paste(255, (40 * scale, 0, 50 * scale, 40 * scale))  # the column of cells right of the middle
    for fit, columns in (("crop", [2]), ("pad", [2]), ("stretch", [2])):
        free = keep_outside(IDS, mask_as_seen(mask, photo.size, fit)).view(4, 4) == FREE  # type: ignore[arg-type]
        rows = [1, 2] if fit == "pad" else [0, 1, 2, 3]
        assert free.nonzero().tolist() == [[row, column] for row in rows for column in columns], fit
    border = Image.new("L", mask.size)
    border.paste(255, (0, 0, 15 * scale, 40 * scale))  # of what a crop leaves out
    with pytest.raises(ValueError, match="dark everywhere"):
        keep_outside(IDS, mask_as_seen(border, photo.size, "crop"))
    square = Image.new("L", (16, 16))
    assert mask_as_seen(square, photo.size, "crop") is square, "made for the square already"


def test_a_completed_picture_keeps_what_was_given() -> None:
    model = TextToImage(tiny_bundle())
    liked = model("a red circle", candidates=2)[0]
    whole = model.complete(liked.tokens, "a red circle", share=1.0, candidates=1)[0]
    assert torch.equal(whole.tokens, liked.tokens)
    for picture in model.complete(liked.tokens, "a blue square", share=0.25, candidates=3, seed=4):
        assert torch.equal(picture.tokens[:4], liked.tokens[:4])
        assert not torch.equal(picture.tokens, liked.tokens)
    photo = Image.new("RGB", (40, 30), "red")
    ids = model.tokens_of(photo)
    assert ids.shape == (16,) and ids.dtype == torch.long
    wide = Image.new("L", (40, 30))
    wide.paste(255, (34, 23, 35, 24))  # the last cell of the middle square
    assert torch.equal(model.complete(photo, "red", mask=wide, candidates=1)[0].tokens[:15], ids[:15])
    mask = Image.new("L", (4, 4))
    mask.putpixel((3, 3), 255)
    assert torch.equal(model.complete(photo, "red", mask=mask, candidates=1)[0].tokens[:15], ids[:15])
