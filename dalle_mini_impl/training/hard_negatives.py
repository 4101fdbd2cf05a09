"""Captions changed in a word or two, so that a picture no longer fulfils them: hard negatives for CLIP.

Random captions of a batch are told apart by what they name; which thing is large, red or on the left is hardly ever
needed, so it is hardly learned (arXiv 2210.01936). Changes are learned from the captions themselves: a word may stand
where it has been seen between the same two neighbours, so that what comes out reads like a caption. Now and then it is
still true ("little" for "small"); no picture gains by that on average.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

Context = tuple[str, str]
_EDGE = ""
_SWAP_SHARE = 0.5


class CaptionChanger:
    """Changes captions as others of the same set suggest.

    captions: those of the training split; words are what stands between spaces.
    """

    def __init__(self, captions: Iterable[str]) -> None:
        seen: dict[Context, set[str]] = defaultdict(set)
        for caption in captions:
            words = caption.split()
            for word, context in zip(words, _contexts(words), strict=True):
                seen[context].add(word)
        self._fitting = {context: sorted(words) for context, words in seen.items() if len(words) > 1}
        self._seen = {context: frozenset(words) for context, words in self._fitting.items()}

    def changed(self, caption: str, rng: np.random.Generator) -> str:
        """The caption with two words swapped or one replaced; itself where the set suggests no change."""
        words = caption.split()
        contexts = _contexts(words)
        swaps = self._swaps(words, contexts)
        if swaps and rng.random() < _SWAP_SHARE:
            i, j = swaps[int(rng.integers(len(swaps)))]
            words[i], words[j] = words[j], words[i]
            return " ".join(words)
        places = [i for i, context in enumerate(contexts) if context in self._fitting]
        if not places:
            return caption
        place = places[int(rng.integers(len(places)))]
        others = [word for word in self._fitting[contexts[place]] if word != words[place]]
        if not others:
            return caption
        words[place] = others[int(rng.integers(len(others)))]
        return " ".join(words)

    def _swaps(self, words: list[str], contexts: list[Context]) -> list[tuple[int, int]]:
        """Places whose different words have each been seen in the other's place."""
        empty: frozenset[str] = frozenset()
        fitting = [self._seen.get(context, empty) for context in contexts]
        return [
            (i, j)
            for i in range(len(words))
            for j in range(i + 1, len(words))
            if words[i] != words[j] and words[j] in fitting[i] and words[i] in fitting[j]
        ]


def _contexts(words: list[str]) -> list[Context]:
    """Both neighbours of each word."""
    return list(zip([_EDGE, *words[:-1]], [*words[1:], _EDGE], strict=True))
