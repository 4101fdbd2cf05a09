"""Experiment trackers, for those who ask for them: what metrics.jsonl and samples/ get, they get, too."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

TrackerName = Literal["tensorboard", "wandb", "trackio"]
TRACKERS: tuple[TrackerName, ...] = get_args(TrackerName)

PROJECT = "dalle-mini"
"""Project that a run belongs to, where the tracker has projects."""
_NOT_METRICS = frozenset({"stage", "step", "evaluation"})
_TOLD_AGAIN = frozenset({"wandb", "trackio"})
"""Trackers that are told a resumed run's recipe again: trackio forgets it; TensorBoard would make two runs of it."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError with the pip command where a tracker is unknown or its package isn't installed."""
    if unknown := [name for name in names if name not in TRACKERS]:
        raise ValueError(f"there is no tracker {', '.join(unknown)}; there are {', '.join(TRACKERS)}")
    if missing := [name for name in names if not _is_installed(name)]:
        raise ValueError(f"tracking with {' and '.join(missing)} needs: pip install {' '.join(missing)}")


def _is_installed(package: str) -> bool:
    """Whether it can be imported; a folder of its name, as trackers like to leave behind, is no package."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def new_run_id() -> str:
    """By what a tracker knows a run again when it is resumed; a folder of the same name is another run."""
    return secrets.token_hex(4)


def build_trackers(names: Sequence[str], out: Path, run_id: str, first_step: int) -> list[GeneralTracker]:
    """Accelerate's trackers of a run, not started yet.

    out: the run's folder; TensorBoard writes into out/tensorboard. first_step: how many steps the run has behind it;
    what TensorBoard was told of later ones, before the run was killed, is hidden there.
    """
    check_trackers(names)
    trackers: list[GeneralTracker] = []
    for name in dict.fromkeys(names):
        if name == "tensorboard":
            trackers.append(TensorBoardTracker("", out / "tensorboard", purge_step=first_step + 1))
        elif name == "wandb":
            trackers.append(WandBTracker(PROJECT, name=out.name, id=run_id, resume="allow", dir=str(out)))
        else:
            trackers.append(TrackioTracker(PROJECT, name=f"{out.name}-{run_id}", resume="allow"))
    return trackers


class Tracking:
    """Hands a run's lines and sheets of pictures to the trackers of its accelerator; nothing where there are none.

    offset: steps of the run before the stage's first, so that steps go on from stage to stage, as trackers want them.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.offset = 0

    def start(self, recipe: Mapping[str, Any], is_known: bool) -> None:
        """Starts the trackers, on the main process; recipe: what to note of the run; is_known: it has been noted.

        Raises ValueError with a tracker's own words where it doesn't start, for example without a login.
        """
        values = flatten(recipe)
        try:
            self.accelerator.init_trackers(PROJECT, None if is_known else values)
            for tracker in self.accelerator.trackers:
                if is_known and tracker.name in _TOLD_AGAIN:
                    tracker.store_init_configuration(values)
        except Exception as error:  # each library has errors of its own
            self.accelerator.trackers.clear()
            names = ", ".join(str(tracker.name) for tracker in self.accelerator.log_with)
            raise ValueError(f"tracking ({names}) can't start: {error}; leave out --track to go without") from error

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl as STAGE/train/NAME or STAGE/validation/NAME, at the run's own step."""
        part = f"{line['stage']}/{'validation' if line.get('evaluation') else 'train'}"
        metrics = {f"{part}/{name}": value for name, value in line.items() if _is_metric(name, value)}
        if metrics:
            metrics[f"{line['stage']}/step"] = line["step"]
            self.accelerator.log(metrics, step=self.offset + line["step"])

    def log_sheet(self, stage: str, step: int, path: Path) -> None:
        """A sheet of pictures, to the trackers that take pictures."""
        if not self.accelerator.is_main_process:
            return
        step += self.offset
        name = f"{stage}/sheet"
        for tracker in self.accelerator.trackers:
            if tracker.name == "trackio":
                import trackio

                tracker.log({name: trackio.Image(str(path))}, step=step)
            elif hasattr(tracker, "log_images"):
                with Image.open(path) as image:
                    sheet = image.convert("RGB")
                if tracker.name == "tensorboard":
                    tracker.log_images({name: np.asarray(sheet)[None]}, step=step, dataformats="NHWC")
                else:
                    tracker.log_images({name: [sheet]}, step=step)


def _is_metric(name: str, value: Any) -> bool:
    return name not in _NOT_METRICS and isinstance(value, int | float) and not isinstance(value, bool)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys, with values that every tracker takes; lists become text."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            plain = value is None or isinstance(value, bool | int | float | str)
            flat[f"{prefix}{key}"] = value if plain else str(value)
    return flat
