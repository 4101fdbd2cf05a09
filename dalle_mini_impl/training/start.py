"""What a run starts from: the checkpoint that --init-from names, or some of its models, as in ``emoji:vae,clip``."""

from __future__ import annotations

from pathlib import Path

from dalle_mini_impl.config import MODELS, Stage
from dalle_mini_impl.pretrained import Bundle, built_in_names, load_bundle
from dalle_mini_impl.training.stages import outdated_by


def split_start(start: str) -> tuple[str, tuple[Stage, ...]]:
    """The checkpoint's name, and the models of it that are to be taken: all of them where none is named.

    Raises ValueError for names that are no models.
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
    return name, taken


def load_start(start: str) -> Bundle:
    """The checkpoint to start from, with the models that are taken.

    Raises ValueError where it lacks one of them, or one is taken without another whose ids or space it knows.
    """
    name, taken = split_start(start)
    bundle = load_bundle(name)
    if taken == MODELS:
        return bundle
    lacking = [model for model in taken if getattr(bundle, model) is None]
    if lacking:
        raise ValueError(f"--init-from {start}: checkpoint {name} has no {lacking[0]}")
    for left in (model for model in MODELS if model not in taken):
        for model in outdated_by(left, bundle.recipe):
            if model in taken:
                raise ValueError(f"--init-from {start}: {model} is of no use without its {left}: take both")
    return bundle.only(taken)
