"""What a run may change about its recipe: taking a checkpoint's architecture over, and going on with a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dalle_mini_impl.config import STAGES, Recipe, Stage
from dalle_mini_impl.data.sources import resolve_spec
from dalle_mini_impl.files import read_json
from dalle_mini_impl.pretrained import Bundle

logger = logging.getLogger("dalle_mini_impl.training")

ARCHITECTURE_KEYS: dict[str, frozenset[str]] = {
    "data": frozenset({"image_size", "fit", "views"}),
    "text": frozenset({"vocab_size", "max_length", "fit_length", "slot_step"}),
    "vae": frozenset(
        {
            "downsample",
            "patch",
            "width",
            "latent_width",
            "encoder_blocks",
            "decoder_blocks",
            "quantizer",
            "codebook_size",
            "code_dim",
            "fsq_levels",
            "reconstruction",
        }
    ),
    "clip": frozenset(
        {
            "embed_dim",
            "stem_width",
            "width",
            "heads",
            "image_layers",
            "text_layers",
            "caption_layers",
            "loss",
            "token_shift",
        }
    ),
    "dalle": frozenset(
        {
            "dim",
            "layers",
            "heads",
            "attention",
            "attention_kernel",
            "positions",
            "ffn",
            "ffn_multiple",
            "token_shift",
            "neighbours",
            "reading_share",
            "image_prefix",
        }
    ),
    "upscale": frozenset({"width", "blocks"}),
    "prior": frozenset({"num_dims", "num_buckets", "num_dot_buckets", "dim", "layers", "heads"}),
}
"""Keys that say what a checkpoint's weights, ids and slots mean: fine-tuning takes them over, and no others."""

_ADDED: dict[str, frozenset[str]] = {
    "clip": frozenset({"caption_layers"}),
    "dalle": frozenset({"image_prefix", "reading_share"}),
}
"""Keys that are 0 where a model hasn't got a part, which fine-tuning can add."""
_ENDED = frozenset({"caption_layers", "reading_share"})
"""Those of them whose part fine-tuning can leave out, where the recipe itself says 0."""


MEMORY_KEYS = ("micro_batch_size", "checkpoint_gradients")
"""Keys of a stage that a run which has run out of memory may go on with as it needs."""

_NOTED = ("recipe", "data", "init_from")
"""What `check_unchanged` asks of a run's note."""


def read_note(path: Path, remedy: str | None = None) -> dict[str, Any]:
    """A run's run.json. Raises ValueError that names it where it is damaged, and the remedy: by default a new run."""
    remedy = remedy or f"delete {path.parent}, or choose another --out"
    note: dict[str, Any] = read_json(path, remedy)
    missing = [key for key in _NOTED if not isinstance(note, dict) or key not in note]
    if missing:
        raise ValueError(f"{path} is damaged (it has no {' and no '.join(missing)}); {remedy}")
    return note


def adopt_architecture(recipe: Recipe, bundle: Bundle, stages: Sequence[Stage] = STAGES) -> Recipe:
    """The recipe with the architecture keys of a checkpoint, as fine-tuning needs it.

    Model sections whose model the checkpoint hasn't got stay the recipe's, and the text's where none of its models has
    read any. So do an image_prefix and a reading_share that its DALL·E hasn't got, and a captioner that its CLIP hasn't
    got: fine-tuning can add them. A reading_share and caption_layers that the recipe itself states are its own in any
    case: 0 ends reading. A CLIP that isn't among the stages, those of the run so far, stays what it is. Views that its
    DALL·E doesn't know come after those that it knows. What is taken over against the recipe's word is logged.
    """
    theirs = bundle.recipe
    sections: dict[str, Any] = {}
    for section, keys in ARCHITECTURE_KEYS.items():
        if _is_taken_over(section, bundle):
            taken = {key: getattr(getattr(theirs, section), key) for key in keys}
            ours = getattr(recipe, section)
            stated = ours.model_fields_set & _ENDED
            stays = section == "clip" and "clip" not in stages
            gains = [key for key in _ADDED.get(section, ()) if not stays and (taken[key] == 0 or key in stated)]
            sections[section] = ours.model_copy(update=taken | {key: getattr(ours, key) for key in gains})
    known = theirs.data.views if bundle.dalle is not None else ()
    views = (*known, *(view for view in recipe.data.views if view not in known))
    sections["data"] = sections["data"].model_copy(update={"views": views})
    adopted = recipe.model_copy(update=sections)
    for key, (own, adopted_value) in differences(_dump(recipe), _dump(adopted)).items():
        logger.info("%s = %s is the checkpoint's (the recipe says %s)", key, adopted_value, own)
    return Recipe.parse(adopted.model_dump(mode="json"))


def _is_taken_over(section: str, bundle: Bundle) -> bool:
    """Whether a section's architecture keys say what a checkpoint's weights mean."""
    if section == "text":
        return bundle.knows_text
    return section == "data" or getattr(bundle, section) is not None


def with_views(bundle: Bundle, recipe: Recipe) -> Bundle:
    """A checkpoint with the views of a recipe that has adopted its architecture: its DALL·E has room for them all."""
    if bundle.dalle is not None:
        bundle.dalle.add_views(len(recipe.data.views))
    data = bundle.recipe.data.model_copy(update={"views": recipe.data.views})
    return replace(bundle, recipe=bundle.recipe.model_copy(update={"data": data}))


def check_unchanged(
    note: Mapping[str, Any],
    recipe: Recipe,
    data_spec: str,
    init_from: str | None,
    untouched: Sequence[Stage],
    out: Path,
) -> None:
    """Raises ValueError that lists what differs from the run in `out`.

    Sections of stages not begun yet may differ, and how much memory a stage takes, which doesn't change its loss.
    """
    # Parsed, so that a run begun before a setting existed is not another run: it gets the setting's default.
    theirs = {**_dump(Recipe.parse(note["recipe"])), "data source": note["data"], "init-from": note["init_from"]}
    ours = {
        **_dump(recipe),
        "data source": _as_noted(data_spec, note["data"]),
        "init-from": _as_noted(init_from, note["init_from"]),
    }
    free = (
        "name",
        "sampling.",
        "train.stages",
        *(f"{stage}." for stage in untouched),
        *(f"train.{stage}." for stage in untouched),
        *(f"train.{stage}.{key}" for stage in theirs["train"] for key in MEMORY_KEYS),
    )
    changed = {key: pair for key, pair in differences(theirs, ours).items() if not key.startswith(free)}
    if changed:
        raise ValueError(
            f"{out} holds another run ({in_words(changed)}): choose another --out, or go on with what it was"
        )


def _as_noted(given: str | None, noted: str | None) -> str | None:
    """What was given; what is noted where that is the same path in other words, or where nothing was given."""
    if given is None or noted is None:
        return noted if given is None else given
    return noted if resolve_spec(given) == resolve_spec(noted) else given


def differences(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys (dotted) at which two nested dictionaries differ, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*first, *(key for key in second if key not in first)]:
        one, other = first.get(key), second.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found |= differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found[f"{prefix}{key}"] = (one, other)
    return found


def in_words(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """What `differences` found, for people."""
    return "; ".join(f"{key} was {was}, now {now}" for key, (was, now) in changed.items())


def _dump(model: BaseModel) -> dict[str, Any]:
    return model.model_dump(mode="json")
