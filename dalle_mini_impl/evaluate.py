"""How often a checkpoint draws what its prompt says, judged claim by claim on made scenes it was never shown."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_mini_impl.data.checker import Verdict, check
from dalle_mini_impl.data.scenes import Background, Claim, Count, Exists, Relation, Scene, render
from dalle_mini_impl.data.shape_captions import parse_caption
from dalle_mini_impl.data.shapes import held_out_scenes
from dalle_mini_impl.sheet import to_pil

Pairs = Literal["seen", "unseen"]
PAIRS: tuple[Pairs, ...] = ("seen", "unseen")
_PICTURES_AT_ONCE = 256
_Z = 1.959964
"""Half-width of a 95 % interval in standard deviations."""


@dataclass(frozen=True)
class Share:
    """So many of so many right, with the share and its 95 % Wilson interval, all in [0, 1]."""

    right: int
    total: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Share:
        """Counts outcomes; raises ValueError where there are none."""
        values = list(outcomes)
        if not values:
            raise ValueError("a share of 0 outcomes is undefined: judge at least 1")
        return cls.wilson(sum(values), len(values))

    @classmethod
    def wilson(cls, right: int, total: int) -> Share:
        """The share of `right` in `total` > 0 with its Wilson score interval, which holds near 0 and 1 as well."""
        share, width = right / total, _Z**2 / total
        middle = (share + width / 2) / (1 + width)
        half = math.sqrt(share * (1 - share) * width + width**2 / 4) / (1 + width)
        return cls(right, total, share, max(0.0, middle - half), min(1.0, middle + half))


@dataclass(frozen=True)
class Judged:
    """The pictures of one prompt with the checker's verdicts: the single sample (candidate 0), and the best ranked."""

    prompt: str
    single: Image.Image
    single_verdict: Verdict
    best: Image.Image
    best_verdict: Verdict


@dataclass(frozen=True)
class PairsReport:
    """Results on one kind of prompts.

    single: share of candidates 0 with every claim right. best: the same of the best ranked; None with one candidate.
    ceiling: the same of true pictures after the VAE's encoding and decoding. by_claim, by_number: single samples, by
    kind of claim and by the number of shapes that the prompt names.
    """

    single: Share
    best: Share | None
    ceiling: Share
    by_claim: dict[str, Share]
    by_number: dict[str, Share]
    judged: list[Judged] = field(repr=False)


class Picture(Protocol):
    """What `Drawer` hands out."""

    @property
    def image(self) -> Image.Image:
        """The picture, RGB."""

    @property
    def candidate(self) -> int:
        """Its number among the candidates of its prompt."""


class Drawer(Protocol):
    """What draws prompts: `TextToImage` or a stand-in."""

    def draw(
        self, prompts: Sequence[str], candidates: int = 1, keep: int | None = None, seed: int = 0
    ) -> Sequence[Sequence[Picture]]:
        """The `keep` best of the candidates of each prompt, best first."""


class Autoencoder(Protocol):
    """What turns pictures (B, 3, S, S) in [0, 1] into ids (B, N) and back: `DiscreteVAE`."""

    def encode(self, images: Tensor) -> Tensor:
        """Ids of pictures."""

    def decode(self, ids: Tensor) -> Tensor:
        """Pictures of ids."""


Progress = Callable[[int, int], None]
"""Called with the number of prompts drawn so far and in all."""


def evaluate_shapes(
    drawer: Drawer,
    vae: Autoencoder,
    image_size: int,
    *,
    num_prompts: int = 200,
    candidates: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[Pairs, PairsReport]:
    """Draws captions of held-out scenes, once with colour-shape pairs of the training and once with others.

    num_prompts: of each kind. candidates: drawn for each prompt; all are ranked by the drawer, and candidate 0 stands
    for the single sample. seed: of the scenes and of the drawing. Raises ValueError for counts below 1.
    """
    if num_prompts < 1 or candidates < 1:
        raise ValueError(f"num_prompts is {num_prompts} and candidates {candidates}; both must be at least 1")
    reports: dict[Pairs, PairsReport] = {}
    for index, pairs in enumerate(PAIRS):
        scenes = held_out_scenes(num_prompts, seed, pairs)
        ceiling = vae_ceiling(vae, scenes, image_size, device)
        judged = []
        for item in _judge(drawer, [caption for _, caption in scenes], candidates, seed):
            judged.append(item)
            if progress is not None:
                progress(index * num_prompts + len(judged), len(PAIRS) * num_prompts)
        reports[pairs] = _report(judged, ceiling, candidates)
    return reports


@torch.no_grad()
def vae_ceiling(
    vae: Autoencoder, scenes: Sequence[tuple[Scene, str]], image_size: int, device: torch.device | str = "cpu"
) -> Share:
    """Share of true pictures that fulfil their captions after encoding and decoding: what no prior can exceed."""
    outcomes: list[bool] = []
    for first in range(0, len(scenes), _PICTURES_AT_ONCE):
        part = scenes[first : first + _PICTURES_AT_ONCE]
        pixels = np.stack([np.asarray(render(scene, image_size)) for scene, _ in part])
        images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255
        decoded = to_pil(vae.decode(vae.encode(images)))
        outcomes += [_verdict(image, caption).all for image, (_, caption) in zip(decoded, part, strict=True)]
    return Share.of(outcomes)


def _verdict(image: Image.Image, caption: str) -> Verdict:
    return check(np.asarray(image), parse_caption(caption))


def _judge(drawer: Drawer, prompts: Sequence[str], candidates: int, seed: int) -> Iterator[Judged]:
    """Draws many prompts to a batch, and judges the pictures of each."""
    at_once = max(1, _PICTURES_AT_ONCE // candidates)
    for first in range(0, len(prompts), at_once):
        part = prompts[first : first + at_once]
        for prompt, pictures in zip(part, drawer.draw(part, candidates, candidates, seed), strict=True):
            best, single = pictures[0].image, next(p.image for p in pictures if p.candidate == 0)
            yield Judged(prompt, single, _verdict(single, prompt), best, _verdict(best, prompt))


def _report(judged: list[Judged], ceiling: Share, candidates: int) -> PairsReport:
    by_claim: dict[str, list[bool]] = defaultdict(list)
    by_number: dict[str, list[bool]] = defaultdict(list)
    for verdict in (item.single_verdict for item in judged):
        for claim, right in zip(verdict.claims, verdict.holds, strict=True):
            by_claim[claim_kind(claim)].append(right)
            if isinstance(claim, Count):
                by_number[str(claim.number)].append(verdict.all)
    return PairsReport(
        single=Share.of(item.single_verdict.all for item in judged),
        best=Share.of(item.best_verdict.all for item in judged) if candidates > 1 else None,
        ceiling=ceiling,
        by_claim={kind: Share.of(outcomes) for kind, outcomes in sorted(by_claim.items())},
        by_number={number: Share.of(outcomes) for number, outcomes in sorted(by_number.items())},
        judged=judged,
    )


def claim_kind(claim: Claim) -> str:
    """What a claim is about, in words."""
    match claim:
        case Exists(size=None, position=None):
            return "shape of a colour"
        case Exists(position=None):
            return "with its size"
        case Exists(size=None):
            return "with its place"
        case Exists():
            return "with its size and place"
        case Relation():
            return "relation"
        case Count():
            return "number of shapes"
        case Background():
            return "background"
