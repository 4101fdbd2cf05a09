"""CLIP as a classifier that was never trained on the classes: each label becomes a caption, the nearest one wins.

bundle = load_bundle("emoji")
classifier = ZeroShotClassifier(bundle.embedder, ["a dog", "a cat"])  # or PretrainedCLIP.load("openai/…")
classifier.probabilities(pictures)  # (n, 2)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dalle_mini_impl.embed import Embedder, Pictures

PLAIN_TEMPLATE = "{}"
"""The label as it is."""


class ZeroShotClassifier:
    """Labels as directions in CLIP's space: of each the mean over its templates' unit vectors (arXiv 2103.00020).

    templates: texts with one {} for the label. Raises ValueError for fewer than two labels, for one that is there
    twice, and for a template without its place.
    """

    def __init__(self, embedder: Embedder, labels: Sequence[str], templates: Sequence[str] = (PLAIN_TEMPLATE,)) -> None:
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
        self.embedder, self.labels = embedder, list(labels)
        captions = [template.replace("{}", label) for label in labels for template in templates]
        self.directions = F.normalize(embedder.encode_texts(captions).view(len(labels), len(templates), -1).mean(dim=1))

    def probabilities(self, pictures: Pictures) -> Tensor:
        """Probability (n, labels) fp32 of each label for pictures (see `embed`); rows add up to 1."""
        return (self.embedder.scale * self.embedder.encode_pictures(pictures) @ self.directions.t()).softmax(dim=1)
