"""CLIP as a classifier that was never trained on the classes: each label becomes a caption, the nearest one wins.

bundle = load_bundle("emoji")
classifier = ZeroShotClassifier(bundle.clip, bundle.tokenizer, ["a dog", "a cat"])
classifier.probabilities(pictures)  # (n, 2)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dalle_mini_impl.clip import CLIP
from dalle_mini_impl.embed import encode_pictures, encode_texts
from dalle_mini_impl.text import TextTokenizer

PLAIN_TEMPLATE = "{}"
"""The label as it is."""


class ZeroShotClassifier:
    """Labels as directions in CLIP's space: of each the mean over its templates' unit vectors (arXiv 2103.00020).

    templates: texts with one {} for the label. Raises ValueError for fewer than two labels, for one that is there
    twice, and for a template without its place.
    """

    def __init__(
        self, clip: CLIP, tokenizer: TextTokenizer, labels: Sequence[str], templates: Sequence[str] = (PLAIN_TEMPLATE,)
    ) -> None:
        if len(labels) < 2:
            raise ValueError(f"labels are {list(labels)}; to tell pictures apart give at least two")
        twice = sorted({label for label in labels if list(labels).count(label) > 1})
        if twice:
            raise ValueError(f"label {twice[0]!r} is given twice")
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r} must hold {{}} once, where the label goes")
        if not templates:
            raise ValueError("give at least one template, for example 'a picture of {}'")
        self.clip, self.labels = clip, list(labels)
        captions = [template.format(label) for label in labels for template in templates]
        self.directions = F.normalize(
            encode_texts(clip, tokenizer, captions).view(len(labels), len(templates), -1).mean(dim=1)
        )

    def probabilities(self, pictures: Tensor) -> Tensor:
        """Probability (n, labels) fp32 of each label for pictures (n, 3, S, S) in [0, 1]; rows add up to 1."""
        return (self.clip.scale * encode_pictures(self.clip, pictures) @ self.directions.t()).softmax(dim=1)
