"""What a run may change about its recipe: taking a checkpoint's architecture over, and going on with a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.pretrained import Bundle

logger = logging.getLogger("dalle_mini_impl.training")

TRAINING_KEYS: dict[Stage, frozenset[str]] = {
    "vae": frozenset(
        {
            "codebook_decay",
            "dead_code_share",
            "commitment_weight",
            "kl_weight",
            "kl_warmup",
            "temperature_final",
            "temperature_anneal",
            "l1_weight",
            "l2_weight",
            "ssim_weight",
            "laplacian_weight",
        }
    ),
    "clip": frozenset({"loss", "reconstructed_share"}),
    "dalle": frozenset({"dropout", "token_corruption", "caption_dropout", "text_loss_weight"}),
}
"""Keys of the model sections that don't change what the weights mean: fine-tuning may choose them anew."""


def adopt_architecture(recipe: Recipe, bundle: Bundle) -> Recipe:
    """The recipe with the checkpoint's picture size, views, text section and model sections, as fine-tuning needs it.

    Training keys of the model sections stay the recipe's own. What is taken over against the recipe's word is logged.
    """
    theirs = bundle.recipe
    sections: dict[str, Any] = {
        "data": recipe.data.model_copy(
            update={"image_size": theirs.data.image_size, "views": theirs.data.views, "fit": theirs.data.fit}
        ),
        "text": theirs.text.model_copy(update={"bpe_dropout": recipe.text.bpe_dropout}),
    }
    for stage, free in TRAINING_KEYS.items():
        if getattr(bundle, stage) is None:
            continue
        kept = {key: getattr(getattr(recipe, stage), key) for key in free if key != "loss" or stage != "clip"}
        sections[stage] = getattr(theirs, stage).model_copy(update=kept)
    adopted = recipe.model_copy(update=sections)
    for key, (own, taken) in differences(_dump(recipe), _dump(adopted)).items():
        logger.info("%s = %s is the checkpoint's (the recipe says %s)", key, taken, own)
    return Recipe.parse(adopted.model_dump(mode="json"))


def check_unchanged(
    note: Mapping[str, Any],
    recipe: Recipe,
    data_spec: str,
    init_from: str | None,
    untouched: Sequence[Stage],
    out: Path,
) -> None:
    """Raises ValueError that lists what differs from the run in `out`, but for sections of stages not begun yet."""
    # Parsed, so that a run begun before a setting existed is not another run: it gets the setting's default.
    theirs = {**_dump(Recipe.parse(note["recipe"])), "data source": note["data"], "init-from": note["init_from"]}
    init_from = init_from if init_from is not None else note["init_from"]
    ours = {**_dump(recipe), "data source": data_spec, "init-from": init_from}
    free = ("name", "sampling.", *(f"{stage}." for stage in untouched), *(f"train.{stage}." for stage in untouched))
    changed = {key: pair for key, pair in differences(theirs, ours).items() if not key.startswith(free)}
    if changed:
        listed = "; ".join(f"{key} was {was}, now {now}" for key, (was, now) in changed.items())
        raise ValueError(f"{out} holds another run ({listed}): choose another --out, or go on with what it was")


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


def _dump(model: BaseModel) -> dict[str, Any]:
    return model.model_dump(mode="json")
