"""The files of an ablation: the plan of its arms, their run folders, and what came out of them."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Settings = list[str]
"""What an arm changes of the recipe, as --set takes it."""


def read_plan(path: Path) -> dict[str, Settings]:
    """The arms of a plan; ValueError where it has none, an arm is no list of texts, or has no folder for itself."""
    arms = tomllib.loads(path.read_text(encoding="utf-8")).get("arms", {})
    if not arms:
        raise ValueError(f'{path} has no arms: write [arms] and a line like "batch 32" = ["train.dalle.batch_size=32"]')
    for name, settings in arms.items():
        if not isinstance(settings, list) or not all(isinstance(item, str) for item in settings):
            raise ValueError(f'{path}: arm {name!r} is {settings!r}; it must be a list like ["dalle.layers=4"]')
    _check_folders(path, arms)
    return dict(arms)


def _check_folders(path: Path, arms: Iterable[str]) -> None:
    """Raises ValueError where an arm of a plan has no run folder, or that of another one."""
    owners: dict[Path, str] = {}
    for name in arms:
        folder = arm_folder(Path(), name)
        if name in ("", ".", ".."):
            raise ValueError(f"{path}: arm {name!r} has no folder of its own: give it another name")
        if folder in owners:
            raise ValueError(
                f"{path}: arms {owners[folder]!r} and {name!r} would train in the same folder, {folder}: name one "
                f"of them so that letters, digits or one of . = - differ"
            )
        owners[folder] = name


def read_recipes(path: Path) -> dict[str, Path]:
    """The arms of a plan that have a recipe of their own; ValueError where there is no such arm or recipe."""
    plan = tomllib.loads(path.read_text(encoding="utf-8"))
    recipes = {name: path.parent / recipe for name, recipe in plan.get("recipes", {}).items()}
    for name, recipe in recipes.items():
        if name not in plan.get("arms", {}):
            raise ValueError(f"{path}: recipe of {name!r}, but there is no such arm: give it a line in [arms], too")
        if not recipe.is_file():
            raise ValueError(f"{path}: arm {name!r} has no recipe at {recipe}; its path starts beside the plan")
    return recipes


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a results.jsonl. Raises ValueError that names one that is damaged, as a killed ablation's last."""
    results = []
    for place, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {place} is damaged ({error}): delete it, to have its arm again") from None
    return results


def arm_folder(out: Path, name: str) -> Path:
    """The run folder of an arm, in an ablation's."""
    return out / re.sub(r"[^\w.=-]+", "_", name)
