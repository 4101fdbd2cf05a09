"""Fine-tuning takes over what a checkpoint's weights mean, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dalle_mini_impl.config import Recipe, Section
from dalle_mini_impl.pretrained import build_upscaler
from dalle_mini_impl.training.recipes import ARCHITECTURE_KEYS, adopt_architecture
from tests.tiny import tiny_bundle

ALWAYS_THE_RECIPES_OWN = {"name", "seed", "train", "vqgan", "sampling"}
TRAINING_KEYS: dict[str, frozenset[str]] = {
    "data": frozenset({"validation_fraction", "image_column", "caption_column", "min_side_px", "max_megapixels"}),
    "text": frozenset({"bpe_dropout"}),
    "vae": frozenset(
        {
            "quantize_after",
            "codebook_decay",
            "dead_code_share",
            "commitment_weight",
            "balance_weight",
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
    "clip": frozenset({"reconstructed_share", "hard_negatives", "caption_weight"}),
    "dalle": frozenset(
        {
            "dropout",
            "token_corruption",
            "caption_dropout",
            "reading_after",
            "embedding_dropout",
            "text_loss_weight",
            "look_ahead",
            "look_ahead_weight",
            "soft_targets",
            "code_features",
        }
    ),
    "prior": frozenset({"dropout", "caption_dropout"}),
    "upscale": frozenset({"factor"}),
}
"""A new key of a recipe belongs here if a checkpoint means the same whatever its value, else to ARCHITECTURE_KEYS."""


def fields(section: str) -> set[str]:
    model: Any = Recipe.model_fields[section].annotation
    assert issubclass(model, Section)
    return set(model.model_fields)


def test_no_config_key_is_forgotten_when_fine_tuning() -> None:
    assert set(Recipe.model_fields) == {*ARCHITECTURE_KEYS, *ALWAYS_THE_RECIPES_OWN}
    assert ARCHITECTURE_KEYS.keys() == TRAINING_KEYS.keys()
    for section, architecture in ARCHITECTURE_KEYS.items():
        assert architecture | TRAINING_KEYS[section] == fields(section), section
        assert not architecture & TRAINING_KEYS[section], section


def changed(value: Any, key: str) -> Any:
    """Another valid value of a recipe's key."""
    special = {
        "quantizer": "fsq", "reconstruction": "logit_laplace", "ffn": "swiglu", "fit": "pad", "loss": "siglip",
        "views": ["plain", "flip"], "fsq_levels": [4, 4], "patch": 4, "downsample": 8,
        "image_column": "picture", "caption_column": "words", "validation_fraction": 0.3, "slot_step": 8,
        "num_dims": 3, "factor": 2,
        "attention": "dalle1", "attention_kernel": 5, "positions": "learned", "reading_share": 0.0,
        "look_ahead": ["below"], "neighbours": ["above"],
    }  # fmt: skip
    if key in special:
        return special[key]
    if isinstance(value, bool):
        return not value
    return value * 2 if isinstance(value, int) else (value or 0.5) / 2


@pytest.mark.parametrize("section", ARCHITECTURE_KEYS)
def test_each_key_comes_from_the_side_it_belongs_to(section: str) -> None:
    bundle = tiny_bundle(*(["dalle.image_prefix=2"] if section == "prior" else []))
    assert bundle.vae is not None
    bundle = replace(bundle, upscale=build_upscaler(bundle.recipe, bundle.vae))
    values = bundle.recipe.model_dump(mode="json")
    values[section] = {key: changed(value, key) for key, value in values[section].items()}
    recipe = Recipe.parse(values)
    adopted = getattr(adopt_architecture(recipe, bundle), section)
    for key in fields(section):
        is_theirs = key in ARCHITECTURE_KEYS[section] and key != "views"  # which can be gained, see below
        side = bundle.recipe if is_theirs else recipe
        assert getattr(adopted, key) == getattr(getattr(side, section), key), key


def test_views_can_be_gained_and_never_lost() -> None:
    known, wanted = ("plain", "flip"), ("plain", "up", "flip", "down")
    bundle = tiny_bundle(f"data.views={list(known)}")
    recipe = Recipe.parse({"data": {"views": wanted}})
    assert adopt_architecture(recipe, bundle).data.views == ("plain", "flip", "up", "down")
    assert adopt_architecture(Recipe(), bundle).data.views == known
    assert adopt_architecture(recipe, replace(bundle, dalle=None)).data.views == wanted


def test_a_prefix_can_be_gained_and_never_lost() -> None:
    plain, with_prefix = tiny_bundle(), tiny_bundle("dalle.image_prefix=2")
    assert adopt_architecture(with_prefix.recipe, plain).dalle.image_prefix == 2
    assert adopt_architecture(plain.recipe, with_prefix).dalle.image_prefix == 2


def test_reading_can_be_gained_and_is_lost_only_where_the_recipe_says_so() -> None:
    plain, reading = tiny_bundle(), tiny_bundle("dalle.reading_share=0.25")
    assert adopt_architecture(reading.recipe, plain).dalle.reading_share == 0.25
    assert adopt_architecture(Recipe(), reading).dalle.reading_share == 0.25
    for share in (0.0, 0.1):
        assert (
            adopt_architecture(Recipe.parse({}, [f"dalle.reading_share={share}"]), reading).dalle.reading_share == share
        )


def test_a_captioner_can_be_gained_and_is_lost_only_where_the_recipe_says_so() -> None:
    plain, reading = tiny_bundle(), tiny_bundle("clip.caption_layers=1")
    assert adopt_architecture(reading.recipe, plain).clip.caption_layers == 1
    assert adopt_architecture(Recipe(), reading).clip.caption_layers == 1
    for layers in (0, 2):
        stated = Recipe.parse({}, [f"clip.caption_layers={layers}"])
        assert adopt_architecture(stated, reading).clip.caption_layers == layers
        # A CLIP that isn't trained stays what it is.
        assert adopt_architecture(stated, reading, ["vae", "dalle"]).clip.caption_layers == 1
        assert adopt_architecture(stated, plain, ["dalle"]).clip.caption_layers == 0


def test_models_that_a_checkpoint_lacks_are_the_recipes_own() -> None:
    bundle = replace(tiny_bundle(), dalle=None)
    recipe = Recipe.parse(bundle.recipe.model_dump(mode="json"), ["dalle.dim=64", "vae.width=16"])
    adopted = adopt_architecture(recipe, bundle)
    assert (adopted.dalle.dim, adopted.vae.width) == (64, bundle.recipe.vae.width)
