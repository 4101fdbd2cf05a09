"""What an arm of an ablation takes over from a finished run: models, tokenizer, pictures and their ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.pretrained import load_bundle, save_bundle
from dalle_mini_impl.training.checkpoint import StateFolder
from dalle_mini_impl.training.recipes import ARCHITECTURE_KEYS, differences, in_words, read_note


def shared_stages(settings: Sequence[str]) -> list[Stage]:
    """The stages that an arm takes over from the base run; none where it changes what all of them read.

    VAE and CLIP change what comes after them, so an arm that touches one trains DALL·E as well. Views count for what
    DALL·E reads alone, and a seed for what the arm trains.
    """
    keys = [setting.partition("=")[0].strip() for setting in settings]
    sections = {"dalle" if key == "data.views" else key.removeprefix("train.").split(".")[0] for key in keys}
    if sections <= {"dalle", "sampling", "seed"}:
        return ["vae", "clip"]
    if sections <= {"dalle", "sampling", "seed", "clip"}:
        return ["vae"]
    return []


def check_base(base: Path, data: str, recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Raises ValueError where an arm with such data and recipe can't begin with these stages of a run.

    They have to be finished, and data, how pictures are read, the tokenizer and the stages' architecture the same.
    """
    if not stages:
        return
    path = base / "run.json"
    if not path.is_file():
        raise ValueError(f"{base} holds no run (no {path.name}): name the --out of a finished one as --base")
    missing = [stage for stage in stages if not StateFolder(base / "state" / stage).finished]
    if missing:
        raise ValueError(f"{base} has not finished {' and '.join(missing)}: an arm can't start from it")
    note = read_note(path, "name another --base")
    theirs = Recipe.parse(note["recipe"], where=str(path))
    changed = differences(
        {"--data": note["data"], **_taken_over(theirs, stages)}, {"--data": data, **_taken_over(recipe, stages)}
    )
    if changed:
        raise ValueError(
            f"arms can't start from {base} ({in_words(changed)}): give them what it was trained with, or train a "
            f"--base with what they have"
        )


def _taken_over(recipe: Recipe, stages: Sequence[Stage]) -> dict[str, Any]:
    """The part of a recipe that decides what an arm takes over; views don't, which have ids of their own."""
    tree = recipe.model_dump(mode="json")
    sections = {
        section: {key: value for key, value in tree[section].items() if key in ARCHITECTURE_KEYS[section]}
        for section in ("text", *stages)
    }
    return {"data": {key: value for key, value in tree["data"].items() if key != "views"}, **sections}


def begin_from(base: Path, folder: Path, stages: Sequence[Stage]) -> None:
    """Makes a run folder that has finished these stages of another run, see `check_base`.

    It shares the other one's pictures and what is cached of them, by links: where it needs other ids, it gets its own.
    """
    if not stages:
        return
    cache = folder / "cache"
    cache.mkdir(parents=True)
    (folder / "data").symlink_to((base / "data").resolve(), target_is_directory=True)
    for path in (base / "cache").resolve().glob("[!.]*"):
        (cache / path.name).symlink_to(path)  # file by file: a link to the folder would have ours written into it
    save_bundle(load_bundle(base / "checkpoint").only(stages), folder / "checkpoint")
    for stage in stages:
        StateFolder(folder / "state" / stage).finish(StateFolder(base / "state" / stage).summary())
