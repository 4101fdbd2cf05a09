"""The judge of drawn emoji: which glyph of an installed font is nearest by its pixels. No model has a part in it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_mini_impl.data.emoji import BACKGROUNDS, SCENE_EMOJI, EmojiScene, Placed, cells_of, render, survey
from dalle_mini_impl.data.emoji_font import find_font
from dalle_mini_impl.data.emoji_names import with_article


class GlyphJudge:
    """Names an emoji by its pixels: the nearest glyph, on any background, in pictures of a quarter of the side."""

    def __init__(self, image_size: int) -> None:
        """Draws every glyph of scenes, 204 with Noto Color Emoji, on each of 8 backgrounds."""
        font, cells = find_font(None), cells_of(image_size)
        known = set(SCENE_EMOJI)
        glyphs = [g for g in survey(font)[0] if not g.toned and g.sequence.rstrip("\ufe0f") in known]
        self.names = [with_article(glyph.name) for glyph in glyphs]
        pictures = [
            np.asarray(render(EmojiScene((Placed(glyph, 0, 0, cells),), cells, background), font, image_size))
            for glyph in glyphs
            for background in BACKGROUNDS
        ]
        self.references = self._features(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255)

    def grade(self, prompt: str, picture: Tensor) -> float:
        """The share of other glyphs that are farther from a picture (3, S, S) in [0, 1] than the prompt's; 1 is right.

        prompt: one of `names`, else ValueError.
        """
        if prompt not in self.names:
            raise ValueError(f"{prompt!r} is no emoji of scenes: see data/emoji.py for their names")
        distances = torch.cdist(self._features(picture[None]), self.references)[0]
        nearest = distances.view(len(self.names), -1).min(dim=1).values
        farther = nearest > nearest[self.names.index(prompt)]
        return int(farther.sum()) / (len(self.names) - 1)

    @staticmethod
    def _features(pictures: Tensor) -> Tensor:
        return F.avg_pool2d(pictures, 4).flatten(1)
