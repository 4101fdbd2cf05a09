"""Textures: the same pictures for the same seed, captions that say what is drawn, detail of the size they name."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.sources import open_source
from dalle_mini_impl.data.textures import COLOURS, MATERIALS, NOUNS, Texture, TexturesSource, render


def test_a_picture_depends_on_seed_and_index_alone() -> None:
    few, many = list(TexturesSource(3, image_size=32)), list(TexturesSource(40, image_size=32))
    for one, other in zip(few, many[:3], strict=True):
        assert one.captions == other.captions and one.load().tobytes() == other.load().tobytes()
    assert few[0].load().tobytes() != next(iter(TexturesSource(3, seed=1, image_size=32))).load().tobytes()
    assert [i for i, record in enumerate(many) if record.split == "validation"] == [19, 39]


@pytest.mark.parametrize("material", MATERIALS)
def test_every_material_has_its_colour_and_more_detail_where_it_is_fine(material: str) -> None:
    def detail(scale: str) -> float:
        pictures = [np.asarray(render(Texture(material, "grey", scale), (i,), 64)) for i in range(8)]  # type: ignore[arg-type]
        return float(np.mean([np.abs(np.diff(p.astype(float), axis=1)).mean() for p in pictures]))

    if material != "sand":  # grains are of a pixel at either size of its ripples
        assert detail("fine") > 1.2 * detail("coarse")
    for colour, (dark, light) in COLOURS.items():
        pixels = np.asarray(render(Texture(material, colour, "coarse"), (0,), 32))
        assert pixels.shape == (32, 32, 3)
        assert (pixels >= np.array(dark)).all() and (pixels <= np.array(light)).all()
        assert pixels.astype(float).std() > 4


def test_captions_tell_material_colour_and_scale() -> None:
    assert NOUNS.keys() == MATERIALS.keys()
    told = {Texture(*what).captions for what in itertools.product(MATERIALS, COLOURS, ("fine", "coarse"))}
    assert len(told) == len(MATERIALS) * len(COLOURS) * 2
    assert ("brown wood with fine grain", "fine brown wood") in told


def test_it_is_opened_by_name() -> None:
    source = open_source("textures:count=5,seed=2", DataConfig(image_size=16))
    assert source.describe == "textures:count=5,seed=2 at 16 pixels"
    with pytest.raises(ValueError, match="at least 16 pixels"):
        open_source("textures:image_size=8", DataConfig())
    with pytest.raises(ValueError, match="at least 1"):
        open_source("textures:count=0", DataConfig())
