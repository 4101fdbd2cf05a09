"""``dalle-mini train``: captioned pictures in, a checkpoint out."""

from __future__ import annotations

import enum
import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.pretrained import load_bundle
from dalle_mini_impl.training.budget import parse_duration, process_age_sec


class StageName(enum.StrEnum):
    """A stage that can be trained alone."""

    vae = "vae"
    clip = "clip"
    dalle = "dalle"
    prior = "prior"
    upscale = "upscale"


def train(
    data: Annotated[
        str, typer.Option(help="Folder, file, tar shards, Hugging Face dataset, or a made source (shapes, emoji).")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run, for example runs/mine.")],
    config: Annotated[
        Path | None,
        typer.Option(help="Recipe, configs/NAME.toml; default: that of --init-from, else built in."),
    ] = None,
    stage: Annotated[StageName | None, typer.Option(help="Train this stage only.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    init_from: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="Start from a checkpoint: NAME, FOLDER or HUB_ID.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the recipe.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Wall-clock time for the whole run: 90s, 25m, 1h30m. Replaces the steps.")
    ] = None,
) -> None:
    """Trains every stage in turn: text tokenizer, discrete VAE, CLIP, DALL·E. Finished stages are not repeated.

    With dalle.image_prefix also unCLIP's prior, between CLIP and DALL·E; with upscale.factor, at last, the upscaler.
    """
    from dalle_mini_impl.training.run import make_accelerator
    from dalle_mini_impl.training.run import train as run_training

    budget_sec = parse_duration(budget) if budget is not None else None
    recipe = _recipe(config, init_from, set_ or [])
    accelerator = make_accelerator()
    _set_up_logging(accelerator.is_main_process)
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
            accelerator=accelerator,
        )
    except KeyboardInterrupt:  # outside of a stage's steps: nothing is lost that wouldn't be made again
        finished = False
    except OSError as error:
        error.add_note("then the same command with --resume goes on from what is saved")
        raise
    finally:
        accelerator.end_training()
    if accelerator.is_main_process:
        checkpoint = out / "checkpoint"
        done = f"{checkpoint} is ready: python sample.py --checkpoint {out} --prompt …"
        typer.echo(done if finished else f"stopped; the same command with --resume goes on ({out})", err=True)


def _recipe(config: Path | None, init_from: str | None, overrides: list[str]) -> Recipe:
    """The recipe of --config, else of --init-from, else the built-in one, with overrides."""
    if config is not None:
        return Recipe.from_toml(config, overrides)
    base = load_bundle(init_from).recipe if init_from is not None else Recipe()
    return Recipe.parse(base.model_dump(mode="json"), overrides, where="--set")


def _as_stage(name: StageName) -> Stage:
    stages: dict[StageName, Stage] = {
        StageName.vae: "vae",
        StageName.clip: "clip",
        StageName.dalle: "dalle",
        StageName.prior: "prior",
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
