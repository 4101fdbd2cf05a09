"""``python -m dalle_mini_impl.bench.guide``: how often guided pictures show what they should, start by start.

Judges are never the CLIP that guides: of checkpoints that draw `shapes` the checker, of those that draw `emoji` the
glyph whose pixels are nearest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from torch import Tensor

from dalle_mini_impl.data.checker import check
from dalle_mini_impl.data.glyph_judge import GlyphJudge
from dalle_mini_impl.data.scenes import COLOURS, SHAPES
from dalle_mini_impl.data.shape_captions import parse_caption
from dalle_mini_impl.guided import GuideSettings, random_ids
from dalle_mini_impl.pipeline import TextToImage
from dalle_mini_impl.sheet import Row, contact_sheet, save_sheet, to_pil

Judge = Callable[[str, Tensor], float]
"""How well a picture (3, S, S) in [0, 1] shows what a prompt says, from 0 to 1; 1 is right."""
STARTS = ("random", "noise", "dalle", "dalle-guided")
"""random codes; guided from there; DALL·E's best of some, unguided; guided from there."""


def shapes_judge(prompt: str, picture: Tensor) -> float:
    """The share of a caption's claims that hold, by the checker."""
    verdict = check(np.asarray(to_pil(picture[None])[0]), parse_caption(prompt))
    return sum(verdict.holds) / len(verdict.holds)


def prompts_and_judge(model: TextToImage, kind: str, count: int) -> tuple[list[str], Judge]:
    """Prompts of one object, evenly picked, and what judges pictures of them."""
    if kind == "shapes":
        names = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
        judge: Judge = shapes_judge
    else:
        glyphs = GlyphJudge(model.bundle.recipe.data.image_size)
        names, judge = glyphs.names, glyphs.grade
    picks = np.linspace(0, len(names), count, endpoint=False).astype(int)
    return [names[pick] for pick in picks], judge


def draw(
    model: TextToImage, prompt: str, start: str, candidates: int, seed: int, settings: GuideSettings
) -> tuple[Tensor, list[float]]:
    """The picture (3, S, S) in [0, 1] that a start leads to, and CLIP's score after each step, if there were any."""
    if start == "random":
        return model.decode(random_ids(model.vae, seed)[None])[0].cpu(), []
    if start == "dalle":
        return model.decode(model(prompt, candidates, 1, seed)[0].tokens[None])[0].cpu(), []
    origin: Literal["noise", "dalle"] = "noise" if start == "noise" else "dalle"
    steps = list(model.guide(prompt, origin, candidates=candidates, seed=seed, settings=settings))
    return steps[-1].picture, [step.score for step in steps]


def main(
    checkpoint: Annotated[str, typer.Option(help="A built-in name, a folder or a Hub id.")] = "emoji",
    kind: Annotated[str, typer.Option(help="What it draws and who judges: emoji or shapes.")] = "emoji",
    starts: Annotated[str, typer.Option(help=f"Some of {', '.join(STARTS)}.")] = ",".join(STARTS),
    prompts: Annotated[int, typer.Option(min=1, help="Names of one object, evenly picked.")] = 30,
    candidates: Annotated[int, typer.Option(min=1, help="Of DALL·E, of which the best is the start.")] = 16,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    clip: Annotated[str | None, typer.Option(help="A pretrained CLIP that guides.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Changes of GuideSettings, as steps=100.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for guide.json and sheet.png.")] = None,
) -> None:
    """Judge guided pictures, start by start: the share that is right, their mean grade, and how CLIP's score rose.

    The grade of shapes is the share of claims that hold, that of emoji the share of other glyphs that are farther from
    the picture than the right one: 0.5 is chance.
    """
    if kind not in ("emoji", "shapes") or not set(starts.split(",")) <= set(STARTS):
        raise typer.BadParameter(f"--kind is emoji or shapes, and --starts are some of {', '.join(STARTS)}")
    changes = dict(change.split("=", 1) for change in settings or [])
    how = GuideSettings.model_validate(changes)
    model = TextToImage.from_pretrained(checkpoint, clip=clip)
    names, judge = prompts_and_judge(model, kind, prompts)
    rows: list[Row] = []
    facts: dict[str, Any] = {"checkpoint": checkpoint, "checkpoint_hash": model.bundle.checkpoint_hash}
    facts |= {"prompts": len(names), "candidates": candidates, "seed": seed, "settings": how.model_dump()}
    heads = f"{'grade':>5}  {'first score':>11}  {'last score':>10}  {'s a picture':>11}"
    typer.echo(f"{'start':<14} {'right':>14}  {heads}")
    for start in starts.split(","):
        facts[start], row = _measure(model, names, judge, start, candidates, seed, how)
        rows.append(row)
    typer.echo(json.dumps(facts))
    if out is not None:
        from dalle_mini_impl.files import write_json

        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "guide.json", facts)
        save_sheet(contact_sheet(rows, columns=10), out / "sheet.png")


def _measure(
    model: TextToImage, names: Sequence[str], judge: Judge, start: str, candidates: int, seed: int, how: GuideSettings
) -> tuple[dict[str, Any], Row]:
    grades, cells, scores = [], [], []
    began = time.perf_counter()
    for index, name in enumerate(names):
        picture, course = draw(model, name, start, candidates, seed + index, how)
        grades.append(judge(name, picture))
        scores += [(course[0], course[-1])] if course else []
        cells.append((to_pil(picture[None])[0], f"{grades[-1]:.2f} {name}"))
    seconds = (time.perf_counter() - began) / len(names)
    right, grade = sum(value == 1 for value in grades), float(np.mean(grades))
    first, last = (float(np.mean(column)) for column in zip(*scores, strict=True)) if scores else (None, None)
    shown = [f"{value:.3f}" if value is not None else "" for value in (grade, first, last)]
    share = f"{right} of {len(names)} ({right / len(names):.0%})"
    typer.echo(f"{start:<14} {share:>14}  {shown[0]:>5}  {shown[1]:>11}  {shown[2]:>10}  {seconds:>11.1f}")
    found = {"right": right, "grade": grade, "first_score": first, "last_score": last, "seconds": seconds}
    return found, (f"{start}: {share} right, grade {grade:.2f}", cells)


if __name__ == "__main__":
    typer.run(main)
