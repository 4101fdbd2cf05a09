"""VQGAN+CLIP: a grid of codes moved, step by step, to where CLIP finds the prompt in the picture (arXiv 2204.08583).

Nothing is trained: the models stay as they are, and Adam moves the latents of one picture. Every step decodes the hard
codes, cuts many slightly different pictures out of the one, and follows the gradient of their distance to the prompts
straight through the rounding to codes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dalle_mini_impl.config import Section
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.embed import Embedder, resized
from dalle_mini_impl.vae.model import DiscreteVAE

LARGEST_WEIGHT = 10.0
_SIDES = re.compile(r"\b(left|right|leftwards?|rightwards?|clockwise|anticlockwise|counterclockwise)\b", re.IGNORECASE)
_LEAST_LOG_PROB = -12.0  # what a code costs at most, so that one impossible cell doesn't outweigh the picture


@dataclass(frozen=True)
class Prompt:
    """What the picture should show or, with a weight below 0, should not."""

    text: str
    weight: float = 1.0

    @classmethod
    def parse(cls, given: str) -> Self:
        """Reads "a green heart" or, with a weight behind the last colon, "a green heart:0.5" or "text:-1".

        Raises ValueError for an empty text and for a weight that is 0 or beyond ±10.
        """
        text, colon, last = given.rpartition(":")
        try:
            weight = float(last) if colon else 1.0
        except ValueError:
            text, weight = given, 1.0  # a colon of the text's own
        else:
            text = text if colon else given
        text = text.strip()
        if not text:
            raise ValueError(f"prompt {given!r} has no text: write it as text or text:weight")
        if weight == 0 or not abs(weight) <= LARGEST_WEIGHT:
            raise ValueError(
                f"prompt {given!r} has weight {weight:g}; it must be between ±{LARGEST_WEIGHT:g} and not 0. "
                f"Where the number belongs to the text, give a weight behind it: {given + ':1'!r}"
            )
        return cls(text, weight)


def main_text(prompts: Sequence[Prompt]) -> str:
    """The text of the first prompt with a positive weight; ValueError where there is none."""
    for prompt in prompts:
        if prompt.weight > 0:
            return prompt.text
    raise ValueError("there is nothing to move to: give at least one prompt with a positive weight")


class GuideSettings(Section):
    """How a picture is guided."""

    steps: Annotated[int, Field(ge=1)] = 200
    """Steps of Adam."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """Of Adam, on the latents; it falls to 0 over the last half of the steps."""
    cutouts: Annotated[int, Field(ge=1)] = 16
    """Pictures that CLIP sees at each step: the whole one, and cut-outs of it."""
    smallest: Annotated[float, Field(gt=0, le=2)] = 0.7
    """Side of the smallest cut-out, as a share of the picture's."""
    largest: Annotated[float, Field(gt=0, le=2)] = 1.1
    """Side of the largest; above 1 the picture's border is continued around it."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 5.0
    """Cut-outs are turned by up to so many degrees either way."""
    noise: Annotated[float, Field(ge=0)] = 0.05
    """Most noise that is added to a cut-out, as a standard deviation of pixels in [0, 1]."""
    flips: bool | None = None
    """Whether cut-outs are mirrored half of the time; by default only where no prompt names a side."""
    smoothness: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the picture's total variation, the mean square difference of neighbouring pixels."""
    nearness: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean square distance of the decoder's input to that of the start."""
    prior: Annotated[float, Field(ge=0)] = 0.05
    """Weight of DALL·E's opinion: nats a token that the codes cost, given the tokens before and the first prompt of
    positive weight. Without it, a small CLIP is content with what no picture looks like."""


@dataclass(frozen=True)
class GuideStep:
    """Where guidance is after some steps; 0 is the start.

    score: cosine of the whole picture with the prompts, their mean by weight, in [-1, 1]. loss: what the next step
    lowers, with all its terms. ids: (N,) int64. picture: (3, S, S) in [0, 1], the decode of these ids.
    """

    step: int
    score: float
    loss: float
    ids: Tensor
    picture: Tensor


@dataclass(frozen=True)
class Prior:
    """A DALL·E that says how likely codes are for a caption (1, T)."""

    dalle: DALLE
    text_ids: Tensor

    @torch.no_grad()
    def log_probs(self, ids: Tensor) -> Tensor:
        """log p(each code | caption, the ids before), (N, num_codes), along a picture's ids (1, N)."""
        ((_, text),) = self.dalle.stream.groups(self.text_ids)
        logits: Tensor = self.dalle(text, ids)[1][0]
        return logits.float().log_softmax(dim=1)


def guide(
    vae: DiscreteVAE,
    embedder: Embedder,
    prompts: Sequence[Prompt],
    *,
    start: Tensor,
    seed: int = 0,
    settings: GuideSettings | None = None,
    prior: Prior | None = None,
) -> Iterator[GuideStep]:
    """Moves a picture to the prompts; yields its start, then the picture after each step.

    start: image ids (N,), for example `random_ids`. seed: of cut-outs and noise; equal seeds give equal pictures on one
    kind of device. prior: with `settings.prior` above 0.
    Raises ValueError without a prompt of positive weight, for smallest > largest, for ids that don't fit the grid, and
    for a prior without its weight or the other way round.
    """
    settings = settings or GuideSettings()
    _check(vae, prompts, start, settings, prior)
    return _steps(vae, embedder, prompts, start, seed, settings, prior)


def _steps(
    vae: DiscreteVAE,
    embedder: Embedder,
    prompts: Sequence[Prompt],
    start: Tensor,
    seed: int,
    settings: GuideSettings,
    prior: Prior | None,
) -> Iterator[GuideStep]:
    device = next(vae.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    flips = settings.flips
    if flips is None:
        flips = not any(_SIDES.search(prompt.text) for prompt in prompts)
    first = vae.quantizer.latents(start[None].to(device), vae.grid_size).detach()
    latents = nn.Parameter(first.clone())
    optimizer = torch.optim.Adam([latents], lr=settings.learning_rate)
    towards = embedder.encode_texts([prompt.text for prompt in prompts])
    weights = torch.tensor([prompt.weight for prompt in prompts])
    with evaluating(vae, embedder.module, *([prior.dalle] if prior is not None else [])):
        for step in range(settings.steps + 1):
            with torch.enable_grad():
                raw, ids = vae.decode_latents(latents)
                picture = clamp_with_gradient(raw)
                seen = cut_out(picture, random_cuts(settings, flips, generator), embedder.image_size)
                spread = settings.noise * torch.rand(len(seen) - 1, 1, 1, 1, generator=generator)
                noise = spread * torch.randn(seen[1:].shape, generator=generator)
                seen = torch.cat([seen[:1], (seen[1:] + noise.to(device)).clamp(0, 1)])
                vectors = embedder.encode_image(seen)
                loss = prompt_loss(vectors, towards.to(vectors.device), weights.to(vectors.device)).to(device)
                loss = loss + _regularisation(vae, latents, first, picture, ids, settings, prior)
            score = (weights * (vectors[0].detach().cpu() @ towards.t())).sum() / weights.abs().sum()
            yield GuideStep(step, score.item(), loss.item(), ids[0].cpu(), picture[0].detach().cpu())
            if step < settings.steps:
                (latents.grad,) = torch.autograd.grad(loss, [latents])  # of nothing else
                optimizer.param_groups[0]["lr"] = settings.learning_rate * rate_share(step / settings.steps)
                optimizer.step()


def random_ids(vae: DiscreteVAE, seed: int) -> Tensor:
    """A picture of noise: random image ids (N,) int64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vae.num_codes, (vae.grid_size**2,), generator=generator)


def rate_share(done: float) -> float:
    """The learning rate as a share of its highest after a share of the steps: flat, then linearly to 0."""
    return min(1.0, 2 * (1 - done))


def prompt_loss(vectors: Tensor, towards: Tensor, weights: Tensor) -> Tensor:
    """Mean over pictures (n, E) of the distances to prompts (P, E), times their weights (P,); 0-d. All unit vectors."""
    distances = spherical_distance(vectors[:, None], towards[None])  # (n, P)
    return (distances * weights).sum(dim=1).mean() / weights.abs().sum()


def spherical_distance(a: Tensor, b: Tensor) -> Tensor:
    """Half of the squared angle between unit vectors (…, E), from 0 to π²/2."""
    chord = (a - b).norm(dim=-1) / 2
    distance: Tensor = 2 * chord.clamp(max=1 - 1e-6).asin().square()
    return distance


def random_cuts(settings: GuideSettings, flips: bool, generator: torch.Generator) -> Tensor:
    """Affine maps (cutouts, 2, 3) from a cut-out's coordinates in [-1, 1] to the picture's; the first is the whole."""
    count = settings.cutouts

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    scale = uniform(math.log(settings.smallest), math.log(settings.largest)).exp()
    angle = uniform(-settings.rotation, settings.rotation) * (math.pi / 180)
    room = (1 - scale).abs()  # so far it can be moved and stay inside, or hold all of the picture
    x, y = room * uniform(-1, 1), room * uniform(-1, 1)
    mirror = uniform(-1, 1).sign() if flips else torch.ones(count)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    maps = torch.stack([torch.stack([mirror * cos, -sin, x], 1), torch.stack([mirror * sin, cos, y], 1)], 1)
    maps[0] = torch.eye(2, 3)
    return maps


def cut_out(picture: Tensor, maps: Tensor, side: int) -> Tensor:
    """Cut-outs (n, 3, side, side) of a picture (1, 3, S, S) by affine maps (n, 2, 3); its border goes on outside."""
    if picture.shape[-1] > side:
        picture = resized(picture, side)  # a picture that is sampled more coarsely than it is drawn must be smooth
    grid = F.affine_grid(maps.to(picture.device), [len(maps), 3, side, side], align_corners=False)
    found = F.grid_sample(picture.expand(len(maps), -1, -1, -1), grid, padding_mode="border", align_corners=False)
    return torch.cat([resized(picture, side), found[1:]])


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        passed: Tensor = gradient * (gradient * (x - x.clamp(0, 1)) >= 0)
        return passed


def clamp_with_gradient(x: Tensor) -> Tensor:
    """Values clamped to [0, 1]; outside, the gradient passes where a step against it leads back inside."""
    clamped: Tensor = _Clamp.apply(x)  # type: ignore[no-untyped-call]
    return clamped


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Keeps models in evaluation mode for a while; afterwards every part of them is in the mode it was in."""
    modes = [(part, part.training) for model in models for part in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _regularisation(
    vae: DiscreteVAE,
    latents: Tensor,
    first: Tensor,
    picture: Tensor,
    ids: Tensor,
    settings: GuideSettings,
    prior: Prior | None,
) -> Tensor:
    """The terms of the loss besides CLIP's, 0-d; those of weight 0 aren't computed."""
    total = latents.new_zeros(())
    if settings.smoothness:
        across, down = picture.diff(dim=3), picture.diff(dim=2)
        total = total + settings.smoothness * (across.square().mean() + down.square().mean())
    if settings.nearness:
        moved = vae.quantizer.relaxed(latents) - vae.quantizer.relaxed(first)
        total = total + settings.nearness * moved.square().mean()
    if prior is not None:
        shares = vae.quantizer.log_assignment(latents)[0].exp()  # (N, num_codes)
        costs = -prior.log_probs(ids).clamp(min=_LEAST_LOG_PROB)
        total = total + settings.prior * (shares * costs).sum(dim=1).mean()
    return total


def _check(
    vae: DiscreteVAE, prompts: Sequence[Prompt], start: Tensor, settings: GuideSettings, prior: Prior | None
) -> None:
    main_text(prompts)
    if settings.smallest > settings.largest:
        raise ValueError(
            f"the smallest cut-out is {settings.smallest:g} of the picture and the largest {settings.largest:g}: "
            f"lower the first or raise the second"
        )
    if (prior is not None) != (settings.prior > 0):
        raise ValueError(f"the prior's weight is {settings.prior:g}: a DALL·E and a weight above 0 go together")
    shape = (vae.grid_size**2,)
    if tuple(start.shape) != shape or not 0 <= int(start.min()) <= int(start.max()) < vae.num_codes:
        raise ValueError(f"the start has shape {tuple(start.shape)}; expected {shape}, ids below {vae.num_codes}")
