"""``dalle-mini train``: captioned pictures in, a checkpoint out."""

from __future__ import annotations

import enum
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dalle_mini_impl.config import MODELS, Recipe, Stage
from dalle_mini_impl.pretrained import load_bundle
from dalle_mini_impl.training.budget import parse_duration, process_age_sec
from dalle_mini_impl.training.recipes import read_note
from dalle_mini_impl.training.start import split_start

if TYPE_CHECKING:
    from accelerate import Accelerator


class PresetName(enum.StrEnum):
    """Recipes that need no file."""

    auto = "auto"
    built_in = "built-in"


class StageName(enum.StrEnum):
    """A stage that can be trained alone."""

    vae = "vae"
    clip = "clip"
    dalle = "dalle"
    prior = "prior"
    distill = "distill"
    vqgan = "vqgan"
    upscale = "upscale"


class TrackerName(enum.StrEnum):
    """An experiment tracker."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    trackio = "trackio"


def train(
    data: Annotated[
        str,
        typer.Option(
            help="Folder, file, tar shards, Hugging Face dataset, or a made source (shapes, textures, emoji)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run, for example runs/mine.")],
    config: Annotated[
        Path | None,
        typer.Option(help="Recipe, configs/NAME.toml; default: the run's own, that of --init-from, else a preset."),
    ] = None,
    preset: Annotated[
        PresetName | None,
        typer.Option(help="Recipe chosen from data, devices and budget (auto: the default), or the built-in one."),
    ] = None,
    stage: Annotated[StageName | None, typer.Option(help="Train this stage only.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    init_from: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Start from a checkpoint, NAME, FOLDER or HUB_ID, or models of it: NAME:vae,clip.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the recipe.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Wall-clock time for the whole run: 90s, 25m, 1h30m. Replaces the steps.")
    ] = None,
    track: Annotated[
        list[TrackerName] | None,
        typer.Option(help="Send metrics and sample sheets to this tracker, too; may be given several times."),
    ] = None,
) -> None:
    """Trains every stage in turn: text tokenizer, discrete VAE, CLIP, DALL·E. Finished stages are not repeated.

    With dalle.image_prefix also unCLIP's prior, between CLIP and DALL·E; with upscale.factor, at last, the upscaler.
    --stage distill teaches the DALL·E of the run, or of --init-from, to draw without guidance what it draws with it;
    --stage vqgan trains the VAE of the run, or of --init-from, further against a discriminator.
    """
    from dalle_mini_impl.training.processes import make_accelerator
    from dalle_mini_impl.training.run import train as run_training

    budget_sec = parse_duration(budget) if budget is not None else None
    if config is not None and preset is not None:
        raise ValueError("--config and --preset both name a recipe: leave one out")
    recipe = _recipe(out, config, init_from, preset, set_ or [])
    accelerator = make_accelerator()
    _set_up_logging(accelerator.is_main_process)
    reasons: list[str] = []
    if recipe is None:
        recipe, reasons = _choose(data, budget_sec, set_ or [], accelerator)
    stages: tuple[Stage, ...] | None = None if stage is None else (_as_stage(stage),)
    try:
        finished = run_training(
            recipe,
            data,
            out,
            stages=stages,
            resume=resume,
            init_from=init_from,
            budget_sec=budget_sec,
            already_sec=process_age_sec(),
            reasons=reasons,
            accelerator=accelerator,
            track=track or (),
        )
    except KeyboardInterrupt:
        _say_stopped(accelerator.is_main_process, out)
        raise typer.Exit(0) from None
    except OSError as error:
        error.add_note("then the same command with --resume goes on from what is saved")
        raise
    if not finished:
        _say_stopped(accelerator.is_main_process, out)
    elif accelerator.is_main_process:
        _say_ready(out)


def _say_ready(out: Path) -> None:
    """What was made, and how to draw with it where it has all that drawing takes."""
    checkpoint = out / "checkpoint"
    draws = all((checkpoint / f"{model}.safetensors").is_file() for model in ("vae", "dalle"))
    remedy = f": python sample.py --checkpoint {out} --prompt …" if draws else ""
    typer.echo(f"{checkpoint} is ready{remedy}", err=True)


def _say_stopped(is_main: bool, out: Path) -> None:
    if is_main:
        typer.echo(f"stopped; the same command with --resume goes on ({out})", err=True)


def _recipe(
    out: Path, config: Path | None, init_from: str | None, preset: PresetName | None, overrides: list[str]
) -> Recipe | None:
    """The recipe that is named, else that the run began with, else of --init-from, with overrides; None: choose one.

    One is chosen, too, where --init-from names some models of a checkpoint: its recipe is of them all.
    """
    if config is not None:
        return Recipe.from_toml(config, overrides)
    note = out / "run.json"
    if preset is PresetName.built_in:
        base: Mapping[str, Any] = {}
    elif note.is_file():
        base = read_note(note)["recipe"]
    elif init_from is not None and preset is None and split_start(init_from)[1] == MODELS:
        base = load_bundle(init_from).recipe.model_dump(mode="json")
    else:
        Recipe.parse({}, overrides, where="--set")  # a mistake is told before the data are looked at
        return None
    return Recipe.parse(base, overrides, where="--set")


def _choose(
    data: str, budget_sec: float | None, overrides: list[str], accelerator: Accelerator
) -> tuple[Recipe, list[str]]:
    """The main process looks at the data and chooses for all; overrides win. Returns the recipe and the reasons."""
    from accelerate.utils import broadcast_object_list

    from dalle_mini_impl.data.survey import survey
    from dalle_mini_impl.training.presets import choose, hardware_of

    parts: list[Any] = [None, None]
    if accelerator.is_main_process:
        asked = Recipe.parse({}, [override for override in overrides if override.startswith("data.")]).data
        side_px = asked.image_size if "image_size" in asked.model_fields_set else None
        choice = choose(survey(data, asked), hardware_of(accelerator), budget_sec, side_px)
        parts = [choice.values, [*choice.reasons, *(f"--set {override}" for override in overrides)]]
        for reason in parts[1]:
            logging.getLogger("dalle_mini_impl.training").info("%s", reason)
    if accelerator.num_processes > 1:
        broadcast_object_list(parts)
    return Recipe.parse(parts[0], overrides, where="--set"), parts[1]


def _as_stage(name: StageName) -> Stage:
    stages: dict[StageName, Stage] = {
        StageName.vae: "vae",
        StageName.clip: "clip",
        StageName.dalle: "dalle",
        StageName.prior: "prior",
        StageName.distill: "distill",
        StageName.vqgan: "vqgan",
        StageName.upscale: "upscale",
    }
    return stages[name]


def _set_up_logging(is_main: bool) -> None:
    """Plain lines with the time on standard error; warnings only from all processes but the first."""
    logger = logging.getLogger("dalle_mini_impl")
    logger.setLevel(os.environ.get("DALLE_MINI_LOG", "INFO") if is_main else "ERROR")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
