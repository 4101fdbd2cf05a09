"""What N is worth: quality of the best of N candidates, judged by somebody else than the ranker."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from dalle_mini_impl.cli.processes import process_state
from dalle_mini_impl.cli.sample import progress_bar, read_prompts
from dalle_mini_impl.data.checker import check_caption
from dalle_mini_impl.data.emoji import EmojiScene, EmojiSource
from dalle_mini_impl.data.glyph_judge import GlyphJudge, SceneJudge
from dalle_mini_impl.data.shapes import held_out_prompts
from dalle_mini_impl.files import check_writable, write_json
from dalle_mini_impl.pipeline import TextToImage
from dalle_mini_impl.pretrained import load_bundle
from dalle_mini_impl.report.drawing import RANKERS, draw_candidates, ranker_curves, scores_of
from dalle_mini_impl.rerank import CurvePoint, rank_pictures

Judge = Callable[[str, Sequence[Image.Image]], list[float]]
"""Quality of pictures that were drawn for a prompt: higher is better."""

_RANKERS = ("clip", "reading", "likelihood", "log_ratio", "clip_reading", "rank", "oracle")
_SHAPES_PROMPTS = 100
_EMOJI_PROMPTS = 100


def draw_curve(
    checkpoint: str,
    clip: str | None,
    prompts_from: str,
    num_prompts: int | None,
    candidates: int,
    judge: str | None,
    seed: int,
    out: Path,
) -> None:
    """Draws the candidates, judges each and writes curve.json and curve.png into `out`.

    The curves: `clip`, `reading` (how likely the prompt is, read from the picture), `likelihood` (how likely the
    picture is, given the prompt) and `log_ratio` (and how much more than without) rank as their names say;
    `clip_reading` by the first two together, `rank` by the score that ranks, the first three; `oracle` lets the judge
    itself choose, which no ranker can beat.
    Raises ValueError for a judge that doesn't suit the prompts, and without matplotlib.
    """
    plot = load_matplotlib()
    prompts, judge_pictures, judged_by = _prompts_and_judge(checkpoint, prompts_from, num_prompts, judge, seed)
    model = TextToImage.from_pretrained(checkpoint, process_state().device, clip)
    check_writable(out)
    scores, quality = [], []
    with progress_bar(len(prompts) * candidates * model.dalle.stream.num_image_tokens) as progress:
        for prompt, pictures in draw_candidates(model, prompts, candidates, seed, lambda done: progress(done, 0)):
            scores.append(scores_of(pictures))
            quality.append(judge_pictures(prompt, [picture.image for picture in pictures]))
    curves = ranker_curves(scores, quality, _RANKERS, seed)
    facts: dict[str, Any] = {
        "checkpoint": checkpoint,
        "recipe": model.bundle.recipe.name,
        "checkpoint_hash": model.bundle.checkpoint_hash,
        "clip": None if model.embedder is None else model.embedder.name,
        "reader": model.reader,
        "prompts_from": prompts_from,
        "num_prompts": len(prompts),
        "candidates": candidates,
        "seed": seed,
        "settings": model.bundle.recipe.sampling.model_dump(),
        "judge": judged_by,
        "interval": "95 % percentile bootstrap over prompts",
        "curves": {name: [dataclasses.asdict(point) for point in points] for name, points in curves.items()},
    }
    write_json(out / "curve.json", facts)
    _plot(plot, curves, facts, out / "curve.png")
    for name, points in curves.items():
        typer.echo(f"{name:>9}: " + "  ".join(f"{point.size}: {point.mean:.3f}" for point in points))
    typer.echo(f"judged by {judged_by}: {out / 'curve.png'}")


def _prompts_and_judge(
    checkpoint: str, prompts_from: str, num_prompts: int | None, judge: str | None, seed: int
) -> tuple[list[str], Judge, str]:
    """The prompts, what judges pictures of them, and that judge's name."""
    if prompts_from == "shapes":
        if judge is not None:
            raise ValueError("shapes are judged by their checker: leave out --judge, or give prompts of your own")
        prompts = held_out_prompts(num_prompts or _SHAPES_PROMPTS, seed)
        return prompts, *shapes_judge()
    if prompts_from in ("emoji", "emoji-scenes"):
        if judge is not None:
            raise ValueError("emoji are judged by their glyphs: leave out --judge, or give prompts of your own")
        image_size = load_bundle(checkpoint).recipe.data.image_size
        if prompts_from == "emoji":
            return emoji_judge(image_size, num_prompts or _EMOJI_PROMPTS)
        return emoji_scenes_judge(image_size, num_prompts or _EMOJI_PROMPTS, seed)
    if judge is None:
        raise ValueError("prompts of your own need --judge CHECKPOINT, whose CLIP judges what the other one ranks")
    score, judged_by = clip_judge(judge, checkpoint)
    return read_prompts(None, Path(prompts_from))[:num_prompts], score, judged_by


def clip_judge(judge: str, checkpoint: str) -> tuple[Judge, str]:
    """The CLIP of another checkpoint as judge, and its name; ValueError where there is none or it is the same one."""
    bundle = load_bundle(judge, process_state().device)
    embedder = bundle.embedder
    if embedder is None:
        raise ValueError(f"judge {judge!r} has no CLIP: give a checkpoint that has one")
    if bundle.checkpoint_hash == load_bundle(checkpoint).checkpoint_hash:
        raise ValueError(f"judge {judge!r} is the ranker itself: give a checkpoint with another CLIP")

    def score(prompt: str, pictures: Sequence[Image.Image]) -> list[float]:
        scores: list[float] = rank_pictures(embedder, _squares(pictures, embedder.image_size), prompt).tolist()
        return scores

    return score, f"mean CLIP score by {judge}"


def shapes_judge() -> tuple[Judge, str]:
    """The checker of made scenes as judge, and its name."""
    return _checker, "the checker of shapes: share of pictures with every claim right"


def emoji_judge(image_size: int, num_prompts: int) -> tuple[list[str], Judge, str]:
    """Names of emoji, evenly picked, the nearest glyph by pixels as judge, and its name."""
    glyphs = GlyphJudge(image_size)
    picks = np.linspace(0, len(glyphs.names), min(num_prompts, len(glyphs.names)), endpoint=False).astype(int)

    def score(prompt: str, pictures: Sequence[Image.Image]) -> list[float]:
        squares = _squares(pictures, image_size)
        return [float(glyphs.grade(prompt, picture) == 1.0) for picture in squares]

    return (
        [glyphs.names[pick] for pick in picks],
        score,
        "the glyph nearest by pixels: share of pictures that are the right one",
    )


def emoji_scenes_judge(image_size: int, num_prompts: int, seed: int) -> tuple[list[str], Judge, str]:
    """Captions of scenes of emoji that training never shows together, their judge, and its name."""
    scenes: dict[str, EmojiScene] = {}
    for scene, caption in EmojiSource(image_size=image_size).held_out_scenes(2 * num_prompts, seed):
        scenes.setdefault(caption, scene)
    scenes = dict(list(scenes.items())[:num_prompts])
    judge = SceneJudge(image_size)

    def score(prompt: str, pictures: Sequence[Image.Image]) -> list[float]:
        return [float(judge.holds(scenes[prompt], picture)) for picture in _squares(pictures, image_size)]

    return list(scenes), score, "the glyphs nearest by pixels: share of pictures with all of them at their places"


def _checker(prompt: str, pictures: Sequence[Image.Image]) -> list[float]:
    return [float(check_caption(np.asarray(picture), prompt)) for picture in pictures]


def _squares(pictures: Sequence[Image.Image], size: int) -> Tensor:
    """Pictures as (n, 3, size, size) float in [0, 1]."""
    arrays = [np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def load_matplotlib() -> Any:
    """matplotlib.figure, which draws without a display and without global state."""
    try:
        import matplotlib.figure
    except ImportError:
        raise ValueError("plots are drawn by matplotlib: pip install 'dalle-mini-impl[eval]'") from None
    return matplotlib.figure


def _plot(figures: Any, curves: dict[str, list[CurvePoint]], facts: dict[str, Any], path: Path) -> None:
    """Draws the curves with their intervals over a logarithmic N."""
    figure = figures.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        sizes = [point.size for point in points]
        (line,) = axes.plot(
            sizes, [point.mean for point in points], "--" if name == "oracle" else "o-", label=RANKERS[name]
        )
        lows, highs = [point.low for point in points], [point.high for point in points]
        axes.fill_between(sizes, lows, highs, color=line.get_color(), alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("candidates N")
    axes.set_ylabel(facts["judge"].split(": ")[-1])
    axes.set_title(f"{facts['recipe']}: best of N, {facts['num_prompts']} prompts, 95 % intervals")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
