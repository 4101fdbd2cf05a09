"""What a run starts from: the checkpoint that --init-from names, or some of its models, as in ``emoji:vae,clip``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dalle_mini_impl.config import OPTIONAL_STAGES, STAGES, Stage
from dalle_mini_impl.pretrained import Bundle, built_in_names, load_bundle

MODELS: tuple[Stage, ...] = (*STAGES, *OPTIONAL_STAGES)
"""What a checkpoint may hold."""
_KNOWS: dict[Stage, Stage] = {"dalle": "vae", "upscale": "vae", "prior": "clip"}
"""Models that mean something beside another one alone."""


def split_start(start: str) -> tuple[str, tuple[Stage, ...]]:
    """The checkpoint's name, and the models of it that are to be taken: all of them where none is named.

    Raises ValueError for names that are no models, and models without those whose ids or space they know.
    """
    name, colon, listed = start.rpartition(":")
    words = [word.strip() for word in listed.split(",")]
    taken = tuple(model for model in MODELS if model in words)
    is_list = (
        bool(colon) and not Path(start).exists() and (bool(taken) or name in built_in_names() or Path(name).is_dir())
    )
    if not is_list:
        return start, MODELS
    unknown = [word for word in words if word not in MODELS]
    if unknown:
        raise ValueError(f"--init-from {start}: no model is called {unknown[0]!r}; there are {', '.join(MODELS)}")
    for model in taken:
        if _KNOWS.get(model, model) not in taken:
            raise ValueError(f"--init-from {start}: {model} is of no use without its {_KNOWS[model]}: take both")
    return name, taken


def load_start(start: str) -> Bundle:
    """The checkpoint to start from, with the models that are taken. Raises ValueError where it lacks one of them."""
    name, taken = split_start(start)
    bundle = load_bundle(name)
    if taken == MODELS:
        return bundle
    lacking = [model for model in taken if getattr(bundle, model) is None]
    if lacking:
        raise ValueError(f"--init-from {start}: checkpoint {name} has no {lacking[0]}")
    left: dict[str, Any] = {model: None for model in MODELS if model not in taken}
    return replace(bundle, **left)
