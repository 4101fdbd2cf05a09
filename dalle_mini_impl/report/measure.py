"""Everything that a report shows and the run's files don't say: computed here, shown by `page.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.data.token_cache import TokenCache, cache_fingerprint
from dalle_mini_impl.drawn import RankedPicture, rank
from dalle_mini_impl.pipeline import TextToImage
from dalle_mini_impl.pretrained import Bundle, load_bundle
from dalle_mini_impl.report.drawing import Prompt, choose_prompts, draw_candidates, ranker_curves, scores_of
from dalle_mini_impl.report.memorisation import (
    Audit,
    Ruler,
    audit,
    clip_ruler,
    features_of,
    nearest_in_views,
    pixel_ruler,
    views_of,
)
from dalle_mini_impl.report.records import RunRecord, StageRecord
from dalle_mini_impl.rerank import CurvePoint
from dalle_mini_impl.text import normalize_caption
from dalle_mini_impl.training.evaluation import held_out
from dalle_mini_impl.vae.losses import reconstruction_metrics
from dalle_mini_impl.vae.model import DiscreteVAE

Judge = Callable[[str, Sequence[Image.Image]], list[float]]
Distance = Literal["pixels", "clip"]

MAX_REFERENCES = 2000
"""Pictures on each side of the memorisation audit at most."""
MAX_CONTROL = 256
_DECODE_BATCH = 64
_DRAWN = ("neighbours", "memorisation", "best-of-n")
"""Sections that need pictures drawn."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A sample beside the picture whose caption it was drawn for and the training picture nearest to it."""

    prompt: Prompt
    sample: RankedPicture
    own: Image.Image
    training: Image.Image
    training_caption: str
    distance: float


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """Best-of-N curves over held-out prompts, as `judged_by` sees it."""

    curves: dict[str, list[CurvePoint]]
    judged_by: str
    num_prompts: int


@dataclass
class Findings:
    """What was found out; where it could not be, it is None or empty, and `missing` says why, by section."""

    num_parameters: dict[str, int] = field(default_factory=dict)
    flat_psnr: float | None = None
    code_counts: npt.NDArray[np.int64] | None = None
    num_searched: int = 0
    distance: Distance = "pixels"
    neighbours: list[Neighbour] = field(default_factory=list)
    audits: list[Audit] = field(default_factory=list)
    best_of_n: BestOfN | None = None
    num_prompts: int = 0
    num_candidates: int = 0
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a report may spend. num_prompts: 0 draws nothing. judge: of best-of-N and its name, None: the run's CLIP."""

    num_prompts: int = 48
    candidates: int = 8
    seed: int = 0
    distance: Distance = "pixels"
    judge: tuple[Judge, str] | None = None
    device: torch.device | str | None = None
    progress: Callable[[int, int], None] = lambda done, total: None


def measure(record: RunRecord, options: Options) -> Findings:
    """Computes what the run's checkpoint and data allow.

    Raises ValueError for a distance by a CLIP that the run hasn't got.
    """
    findings = Findings(distance=options.distance)
    data, bundle = _open(record, options)
    if bundle is not None:
        models = {stage: getattr(bundle, stage, None) for stage in record.stages}
        for stage, model in models.items():
            if model is not None:
                findings.num_parameters[stage] = sum(p.numel() for p in model.parameters())
    if options.distance == "clip" and (bundle is None or bundle.clip is None):
        raise ValueError("--distance clip needs a CLIP, and the run has none yet: leave it out, pixels need no model")
    if data is not None:
        findings.flat_psnr = flat_psnr(data, record.recipe.vae.downsample)
    if data is None or bundle is None or bundle.vae is None:
        reason = _why_no_pictures(record) if data is None else _why_absent("The VAE", record.stages["vae"])
        findings.missing |= dict.fromkeys(("codebook", *_DRAWN), reason)
        return findings
    _count_codes(findings, record, data, bundle)
    if bundle.dalle is None:
        reason = _why_absent("DALL·E", record.stages["dalle"])
        findings.missing |= dict.fromkeys(_DRAWN, reason)
    else:
        _draw_and_judge(findings, data, bundle, options)
    return findings


def _why_no_pictures(record: RunRecord) -> str:
    """Why the run has no prepared pictures."""
    if record.data_report is None:
        return "The pictures are not read yet."
    return f"The run's pictures are gone: {record.folder / 'data'} has none. Its own train command reads them again."


def _why_absent(name: str, stage: StageRecord) -> str:
    """Why the checkpoint has no model of a stage."""
    is_part = stage.progress != "not part of this recipe"
    return f"{name} is {'not trained yet' if is_part else 'not part of this recipe'}."


def _open(record: RunRecord, options: Options) -> tuple[PreparedData | None, Bundle | None]:
    """The run's data and checkpoint, where there are any."""
    has_data = (record.folder / "data" / "index.json").is_file()
    data = PreparedData.open(record.folder / "data") if has_data else None
    checkpoint = record.folder / "checkpoint"
    return data, load_bundle(checkpoint, options.device) if (checkpoint / "config.json").is_file() else None


def flat_psnr(data: PreparedData, downsample: int) -> float:
    """PSNR in dB of held-out pictures with one flat colour, the mean, for each token: what is had without a VAE."""
    values = []
    indices = held_out(data)
    for start in range(0, len(indices), _DECODE_BATCH):
        images = data.images(indices[start : start + _DECODE_BATCH])
        flat = F.interpolate(F.avg_pool2d(images, downsample), scale_factor=downsample, mode="nearest")
        values.append(reconstruction_metrics(images, flat)["psnr"])
    return float(torch.cat(values).mean())


def _count_codes(findings: Findings, record: RunRecord, data: PreparedData, bundle: Bundle) -> None:
    assert bundle.vae is not None
    fingerprint = cache_fingerprint(bundle.vae, data.fingerprint, record.recipe.data.views)
    cache = TokenCache.open(record.folder / "cache", fingerprint)
    if cache is None and record.is_finished:
        findings.missing["codebook"] = "No stage of this run needed an id cache, whose ids are counted here."
    elif cache is None:
        findings.missing["codebook"] = "The id cache is not made yet; it comes with the stage after the VAE."
    else:
        findings.code_counts = cache.counts(data.train)


def _draw_and_judge(findings: Findings, data: PreparedData, bundle: Bundle, options: Options) -> None:
    """Draws once, for the samples beside their neighbours, the audit and the best-of-N curve."""
    prompts = choose_prompts(data, options.num_prompts, options.seed)
    if not prompts:
        reason = "no training picture has a caption" if options.num_prompts else "ask for samples with --samples"
        nothing_drawn = f"Nothing was drawn: {reason}."
        findings.missing |= dict.fromkeys(_DRAWN, nothing_drawn)
        return
    model = TextToImage(_at_training_size(bundle))
    total = len(prompts) * options.candidates * model.dalle.stream.num_image_tokens
    texts = [prompt.text for prompt in prompts]
    found = draw_candidates(model, texts, options.candidates, options.seed, lambda done: options.progress(done, total))
    drawn = [pictures for _, pictures in found]
    findings.num_prompts, findings.num_candidates = len(prompts), options.candidates
    rulers = [pixel_ruler(), *([clip_ruler(bundle.clip)] if bundle.clip is not None else [])]
    ruler = next(ruler for ruler in rulers if ruler.name == options.distance)
    mirrored = "flip" in bundle.recipe.data.views
    findings.neighbours = _neighbours(prompts, [rank(pictures, 1)[0] for pictures in drawn], data, ruler, mirrored)
    findings.num_searched = len(data.train)
    _audit(findings, prompts, drawn, data, model.vae, rulers, options.seed, mirrored)
    _judge_best_of_n(findings, prompts, drawn, model, options)


def _at_training_size(bundle: Bundle) -> Bundle:
    """A checkpoint that draws as large as the pictures it has learnt from, which what it draws is compared with."""
    sampling = bundle.recipe.sampling.model_copy(update={"upscale": False})
    return replace(bundle, recipe=bundle.recipe.model_copy(update={"sampling": sampling}))


def _pixels(pictures: Sequence[RankedPicture]) -> Tensor:
    """Drawn pictures as (n, 3, S, S) in [0, 1]."""
    arrays = np.stack([np.asarray(picture.image) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def _neighbours(
    prompts: Sequence[Prompt], samples: Sequence[RankedPicture], data: PreparedData, ruler: Ruler, mirrored: bool
) -> list[Neighbour]:
    """The best sample of each prompt beside the nearest of all training pictures."""
    views = views_of(ruler, _pixels(samples), mirrored)
    distances, indices = nearest_in_views(views, lambda: features_of(ruler, data, data.train))
    return [
        Neighbour(
            prompt=prompt,
            sample=sample,
            own=Image.fromarray(data.pictures[prompt.index]),
            training=Image.fromarray(data.pictures[index]),
            training_caption=data.captions[index][0] if data.captions[index] else "",
            distance=distance,
        )
        for prompt, sample, distance, index in zip(prompts, samples, distances.tolist(), indices.tolist(), strict=True)
    ]


def _audit(
    findings: Findings,
    prompts: Sequence[Prompt],
    drawn: Sequence[Sequence[RankedPicture]],
    data: PreparedData,
    vae: DiscreteVAE,
    rulers: Sequence[Ruler],
    seed: int,
    mirrored: bool,
) -> None:
    """Every drawn picture between as many training as held-out pictures, by each ruler."""
    sides = {side: np.array([p.index for p in prompts if p.from_training is side], np.int64) for side in (True, False)}
    if not len(sides[False]):
        has_some = any(data.captions[index] for index in data.validation)
        findings.missing["memorisation"] = (
            "A single caption can't come from both sides: ask for two or more with --samples."
            if has_some
            else "No captioned picture is held out, so there is nothing to compare with."
        )
        return
    rng = np.random.default_rng(seed)
    others = rng.permutation(np.setdiff1d(data.validation, sides[False]))
    num_control = min(MAX_CONTROL, len(others) // 3)
    control, others = others[:num_control], others[num_control:]
    more = rng.permutation(np.setdiff1d(data.train, sides[True]))
    num_more = min(len(others), len(more), MAX_REFERENCES)
    training = np.concatenate([sides[True], more[:num_more]])
    held = np.concatenate([sides[False], others[:num_more]])
    samples = torch.cat([_pixels(pictures) for pictures in drawn])
    owners = [index for index, pictures in enumerate(drawn) for _ in pictures]
    _, same_caption = np.unique([normalize_caption(prompt.text) for prompt in prompts], return_inverse=True)
    decoded = _through_vae(vae, data.images(control)) if num_control else None
    for ruler in rulers:
        findings.audits.append(
            audit(
                ruler,
                samples,
                [int(same_caption[owner]) for owner in owners],
                [prompts[owner].from_training for owner in owners],
                torch.cat([features for _, features in features_of(ruler, data, training)]),
                torch.cat([features for _, features in features_of(ruler, data, held)]),
                control=decoded,
                mirrored=mirrored,
            )
        )


@torch.no_grad()
def _through_vae(vae: DiscreteVAE, images: Tensor) -> Tensor:
    device = next(vae.parameters()).device
    parts = torch.split(images, _DECODE_BATCH)
    return torch.cat([vae.decode(vae.encode(part.to(device))).float().cpu() for part in parts])


def _judge_best_of_n(
    findings: Findings,
    prompts: Sequence[Prompt],
    drawn: Sequence[Sequence[RankedPicture]],
    model: TextToImage,
    options: Options,
) -> None:
    """Held-out prompts alone; without a judge the run's CLIP judges what the transformer ranks by itself."""
    chosen = [pictures for prompt, pictures in zip(prompts, drawn, strict=True) if not prompt.from_training] or drawn
    if options.candidates < 2:
        findings.missing["best-of-n"] = "One candidate a prompt leaves nothing to choose: raise --candidates."
        return
    if options.judge is not None:
        judge, judged_by = options.judge
        rankers = ["clip", "reading", "likelihood", "rank", "oracle"]
        quality = [judge(pictures[0].prompt, [picture.image for picture in pictures]) for pictures in chosen]
    elif model.bundle.clip is not None:
        judged_by, rankers = "the run's own CLIP (cosine), so it can't be among the rankers", ["reading", "likelihood"]
        quality = [[score for score in scores_of(pictures)["clip"] if score is not None] for pictures in chosen]
    else:
        findings.missing["best-of-n"] = "There is nobody to judge: train CLIP, or name another checkpoint with --judge."
        return
    curves = ranker_curves([scores_of(pictures) for pictures in chosen], quality, rankers, options.seed)
    findings.best_of_n = BestOfN(curves=curves, judged_by=judged_by, num_prompts=len(chosen))
