"""The judges of drawn emoji: which glyph of an installed font is nearest by its pixels. No model has a part in them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_mini_impl.data.emoji import BACKGROUNDS, SCENE_EMOJI, EmojiScene, Placed, cells_of, render, survey
from dalle_mini_impl.data.emoji_font import find_font
from dalle_mini_impl.data.emoji_names import Glyph, with_article

_INK, _EMPTY = 0.25, 0.97
"""How far from the background a channel of a pixel is that shows something, and how much is to show nothing."""


class GlyphJudge:
    """Names an emoji by its pixels: the nearest glyph, on any background, in pictures of a quarter of the side."""

    def __init__(self, image_size: int) -> None:
        """Draws every glyph of scenes, 204 with Noto Color Emoji, on each of 8 backgrounds."""
        glyphs, self.references = _references(image_size, cells_of(image_size))
        self.names = [with_article(glyph.name) for glyph in glyphs]

    def grade(self, prompt: str, picture: Tensor) -> float:
        """The share of other glyphs that are farther from a picture (3, S, S) in [0, 1] than the prompt's; 1 is right.

        prompt: one of `names`, else ValueError.
        """
        if prompt not in self.names:
            raise ValueError(f"{prompt!r} is no emoji of scenes: see data/emoji.py for their names")
        distances = torch.cdist(_features(picture[None]), self.references)[0]
        nearest = distances.view(len(self.names), -1).min(dim=1).values
        farther = nearest > nearest[self.names.index(prompt)]
        return int(farther.sum()) / (len(self.names) - 1)


class SceneJudge:
    """Tells whether a picture shows a scene: each emoji at its place the nearest glyph, on the right background."""

    def __init__(self, image_size: int) -> None:
        """Draws every glyph as large as in scenes, on each background."""
        self.cells = cells_of(image_size)
        self.cell = image_size / self.cells
        self.side = round(self.cells // 2 * self.cell)
        glyphs, self.references = _references(self.side, self.cells // 2)
        self.sequences = [glyph.sequence for glyph in glyphs]
        self.colours = torch.tensor(list(BACKGROUNDS.values())) / 255  # (8, 3)

    def holds(self, scene: EmojiScene, picture: Tensor) -> bool:
        """Whether a picture (3, S, S) in [0, 1] shows a scene of `EmojiSource.composed`, with nothing in other places.

        An emoji may stand one cell off: pairs do in training, where a picture's middle falls between two cells.
        """
        rest = torch.ones(picture.shape[1:], dtype=torch.bool)
        for item in scene.placed:
            place = self._find(item, picture)
            if place is None:
                return False
            rest[place] = False
        median = picture[:, rest].median(dim=1).values
        nearest = list(BACKGROUNDS)[int((self.colours - median).norm(dim=1).argmin())]
        is_empty = (picture[:, rest] - median[:, None]).abs().amax(dim=0) < _INK
        return nearest == scene.background and float(is_empty.float().mean()) > _EMPTY

    def _find(self, item: Placed, picture: Tensor) -> tuple[slice, slice] | None:
        """Where an emoji is that a scene has about there, None where another glyph is nearer."""
        shifts = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]
        corners = [(item.x + x, item.y + y) for x, y in shifts]
        last = self.cells - self.cells // 2
        squares = [self._square(x, y) for x, y in corners if 0 <= x <= last and 0 <= y <= last]
        crops = torch.stack([picture[:, rows, columns] for rows, columns in squares])
        distances = torch.cdist(_features(crops), self.references)  # (n, glyphs × backgrounds)
        best, glyph = divmod(int(distances.argmin()), distances.shape[1])
        return squares[best] if self.sequences[glyph // len(BACKGROUNDS)] == item.glyph.sequence else None

    def _square(self, x: int, y: int) -> tuple[slice, slice]:
        """Rows and columns of the square whose upper left cell is (x, y)."""
        left, top = round(x * self.cell), round(y * self.cell)
        return slice(top, top + self.side), slice(left, left + self.side)


def _references(side: int, cells: int) -> tuple[list[Glyph], Tensor]:
    """Every glyph of scenes, and its features (glyphs × 8, F) on each background in turn, side pixels wide."""
    font, known = find_font(None), set(SCENE_EMOJI)
    glyphs = [g for g in survey(font)[0] if not g.toned and g.sequence.rstrip("\ufe0f") in known]
    pictures = [
        np.asarray(render(EmojiScene((Placed(glyph, 0, 0, cells),), cells, background), font, side))
        for glyph in glyphs
        for background in BACKGROUNDS
    ]
    return glyphs, _features(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255)


def _features(pictures: Tensor) -> Tensor:
    """A quarter of the side of pictures (n, 3, S, S), flat."""
    return F.avg_pool2d(pictures, 4).flatten(1)
