"""``dalle-mini guide``: VQGAN+CLIP, a picture moved to the prompts by CLIP's gradient."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dalle_mini_impl.cli.pictures import CLIP_HELP

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL import Image
    from torch import Tensor

    from dalle_mini_impl.guided import GuideSettings, GuideStep, Prompt
    from dalle_mini_impl.pipeline import TextToImage

_SHOWN_SIDE = 256  # frames of an animation are at least so large
_MOST_FRAMES = 80
_FRAME_MS, _LAST_FRAME_MS = 60, 2000


class Animation(enum.StrEnum):
    """The kinds of file that an animation can be."""

    gif = "gif"
    webp = "webp"
    none = "none"


def guide(
    prompts: Annotated[
        list[str], typer.Argument(help='What to show, "a green heart"; several with weights, "text:-0.5" to avoid it.')
    ],
    from_: Annotated[
        str, typer.Option("--from", help='Where to start: "noise", "dalle" (its best sample), or a picture.')
    ] = "noise",
    checkpoint: Annotated[str, typer.Option(help="A built-in name, a folder or a Hub id.")] = "emoji",
    clip: Annotated[str | None, typer.Option(help=CLIP_HELP)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of Adam. (default 200)")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam on the latents.")] = None,
    cutouts: Annotated[int | None, typer.Option(min=1, help="Pictures that CLIP sees at each step.")] = None,
    smallest: Annotated[float | None, typer.Option(help="Side of the smallest cut-out, as a share.")] = None,
    largest: Annotated[float | None, typer.Option(help="Side of the largest; above 1 it holds more than all.")] = None,
    rotation: Annotated[float | None, typer.Option(help="Degrees that cut-outs are turned by, at most.")] = None,
    noise: Annotated[float | None, typer.Option(help="Noise on cut-outs, at most.")] = None,
    flips: Annotated[
        bool | None, typer.Option("--flips/--no-flips", help="Mirrored cut-outs. (default: unless a side is named)")
    ] = None,
    smoothness: Annotated[float | None, typer.Option(help="Weight of the picture's total variation.")] = None,
    nearness: Annotated[float | None, typer.Option(help="Weight of the distance to the start.")] = None,
    prior: Annotated[float | None, typer.Option(help="Weight of DALL·E's opinion of the codes.")] = None,
    candidates: Annotated[int, typer.Option(min=1, help="With --from dalle: drawn, of which the best is taken.")] = 16,
    seed: Annotated[int, typer.Option(help="The same seed gives the same picture.")] = 0,
    every: Annotated[int | None, typer.Option(min=1, help="Also write the picture after each so many steps.")] = None,
    animation: Annotated[Animation, typer.Option(help="How it became what it is.")] = Animation.gif,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("outputs/guided"),
) -> None:
    """Let CLIP guide a picture to prompts: its codes move, step by step, to where the prompts are found in it.

    Writes the picture as a PNG with its settings inside, an animation, and a JSON file of the score after
    each step.
    """
    from dalle_mini_impl.cli.processes import process_state
    from dalle_mini_impl.files import check_writable, write_json
    from dalle_mini_impl.guided import Prompt, main_text
    from dalle_mini_impl.pipeline import TextToImage
    from dalle_mini_impl.sheet import save_png, slug, to_pil

    changes = {"steps": steps, "learning_rate": learning_rate, "cutouts": cutouts, "smallest": smallest}
    changes |= {"largest": largest, "rotation": rotation, "noise": noise, "flips": flips}
    settings = read_settings({**changes, "smoothness": smoothness, "nearness": nearness, "prior": prior})
    parsed = [Prompt.parse(prompt) for prompt in prompts]
    model = TextToImage.from_pretrained(checkpoint, process_state().device, clip)
    target = out / f"{slug(main_text(parsed))}-guided-seed{seed}.png"
    if target.exists() and from_ not in ("noise", "dalle") and Path(from_).resolve() == target.resolve():
        raise ValueError(f"{from_} is where the result would go: give another --out or --seed")
    start = starting_tokens(model, parsed, from_, candidates, seed)
    facts = _facts(model, checkpoint, parsed, settings, seed, from_, start)
    course = model.guide(parsed, start, seed=seed, settings=settings)
    check_writable(out)
    frames: list[Image.Image] = []
    scores: list[dict[str, Any]] = []
    frame_every = -(-settings.steps // _MOST_FRAMES)
    for step in _shown(course, settings.steps):
        scores.append({"step": step.step, "score": step.score, "loss": step.loss})
        (picture,) = to_pil(step.picture[None])
        if step.step % frame_every == 0 or step.step == settings.steps:
            frames.append(picture)
        if every is not None and step.step % every == 0:
            on_the_way = target.with_name(f"{target.stem}-steps")
            on_the_way.mkdir(exist_ok=True)
            save_png(picture, on_the_way / f"{step.step:04d}.png", _of_step(facts, step))
    save_png(picture, target, _of_step(facts, step))
    write_json(target.with_suffix(".json"), {**facts, "start_tokens": None, "steps": scores})
    if animation is not Animation.none:
        save_animation(frames, target.with_suffix(f".{animation.value}"))
    first, last = scores[0]["score"], scores[-1]["score"]
    typer.echo(f"score {first:.3f} → {last:.3f} in {settings.steps} steps: {target}")


def read_settings(changes: dict[str, Any]) -> GuideSettings:
    """The settings of those changes that aren't None; ValueError for a bad one."""
    from pydantic import ValidationError

    from dalle_mini_impl.guided import GuideSettings

    try:
        return GuideSettings(**{name: value for name, value in changes.items() if value is not None})
    except ValidationError as error:
        problems = [f"{item['loc'][0]} is {item['input']!r}: {item['msg']}" for item in error.errors()]
        raise ValueError("; ".join(problems)) from None


def starting_tokens(model: TextToImage, prompts: Sequence[Prompt], origin: str, candidates: int, seed: int) -> Tensor:
    """The image ids (N,) that --from names; ValueError where it is neither a known word nor a picture."""
    from dalle_mini_impl.cli.origin import Origin

    if origin == "noise":
        return model.starting_tokens(prompts, "noise", seed=seed)
    if origin == "dalle":
        return model.starting_tokens(prompts, "dalle", candidates, seed)
    if not Path(origin).is_file():
        raise ValueError(f'--from is {origin!r}; it must be "noise", "dalle" or a picture file')
    return Origin.read(Path(origin)).tokens(model)


def save_animation(frames: Sequence[Image.Image], path: Path) -> None:
    """Writes frames as an animated GIF or WebP that goes on for ever and rests at its end; small ones are enlarged."""
    from PIL import Image

    from dalle_mini_impl.files import naming

    factor = -(-_SHOWN_SIDE // frames[0].width)
    size = (frames[0].width * factor, frames[0].height * factor)
    large = [frame.resize(size, Image.Resampling.NEAREST) for frame in frames]
    durations = [_FRAME_MS] * (len(large) - 1) + [_LAST_FRAME_MS]
    with naming(path):
        large[0].save(path, save_all=True, append_images=large[1:], duration=durations, loop=0)


def _facts(
    model: TextToImage,
    checkpoint: str,
    prompts: Sequence[Prompt],
    settings: GuideSettings,
    seed: int,
    origin: str,
    start: Tensor,
) -> dict[str, Any]:
    """What the files say of how the picture came about: enough to guide it again."""
    from dalle_mini_impl import __version__
    from dalle_mini_impl.guided import main_text

    return {
        "kind": "guided",
        "prompt": main_text(prompts),
        "prompts": [{"text": prompt.text, "weight": prompt.weight} for prompt in prompts],
        "seed": seed,
        "settings": settings.model_dump(),
        "from": origin,
        "start_tokens": start.tolist(),
        "checkpoint": checkpoint,
        "checkpoint_hash": model.bundle.checkpoint_hash,
        "clip": None if model.embedder is None else model.embedder.name,
        "package_version": __version__,
    }


def _of_step(facts: dict[str, Any], step: GuideStep) -> dict[str, Any]:
    return {**facts, "step": step.step, "clip_score": step.score, "tokens": step.ids.tolist()}


def _shown(course: Iterator[GuideStep], total: int) -> Iterator[GuideStep]:
    """Passes steps on, with a bar and the score on the error stream."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    score = TextColumn("score {task.fields[score]:.3f}")
    columns = (TextColumn("guiding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), score)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("guiding", total=total, score=0.0)
        for step in course:
            bar.update(task, completed=step.step, score=step.score)
            yield step
