"""Estimates agree with what is built, counted and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dalle_mini_impl.cli.app import main
from dalle_mini_impl.config import STAGES, Recipe
from dalle_mini_impl.estimate import ACHIEVED, estimate
from dalle_mini_impl.layers.attention import KVCache
from tests.tiny import tiny_bundle, tiny_recipe

ROOT = Path(__file__).parent.parent


def test_parameters_are_those_of_the_models() -> None:
    bundle = tiny_bundle()
    recipe = tiny_recipe(f"text.vocab_size={bundle.stream.text_vocab}")
    found = estimate(recipe).stages
    for stage, part in found.items():
        model = getattr(bundle, stage)
        assert part.parameters == sum(parameter.numel() for parameter in model.parameters()), stage


def test_operations_follow_the_formula_of_a_transformer() -> None:
    recipe = tiny_recipe("dalle.dim=64", "dalle.layers=3", "dalle.heads=2")
    part = estimate(recipe).stages["dalle"]
    text, image = recipe.text.max_length, recipe.grid_size**2
    tokens = text + image - 1
    trunk = 2 * 12 * 3 * 64**2 * tokens + 3 * 4 * 64 * tokens**2
    heads = 2 * 64 * ((text - 1) * recipe.text.vocab_size + image * recipe.vae.num_codes)
    assert part.forward_flops == pytest.approx(trunk + heads, rel=0.01)
    assert part.train_flops == 3 * part.forward_flops * part.batch_size * part.steps


def test_the_cache_is_as_large_as_the_one_that_is_allocated() -> None:
    recipe = tiny_recipe()
    config = recipe.dalle
    capacity = recipe.text.max_length + recipe.grid_size**2 - 1
    cache = KVCache.allocate(config.layers, 2, config.heads, capacity, config.dim // config.heads, dtype=torch.bfloat16)
    assert estimate(recipe).cache_bytes == 2 * cache.keys.numel() * cache.keys.element_size()


def test_without_guidance_one_branch_is_drawn() -> None:
    with_guidance, without = (estimate(tiny_recipe(f"sampling.guidance={scale}")) for scale in (3, 1))
    assert (with_guidance.guidance, without.guidance) == (3, 1)
    assert with_guidance.cache_bytes == 2 * without.cache_bytes
    assert with_guidance.draw_flops == 2 * without.draw_flops == 2 * without.stages["dalle"].forward_flops


def test_activations_grow_with_the_batch_and_shrink_when_it_is_cut_up() -> None:
    small, large, cut = (
        estimate(tiny_recipe(*values)).stages["dalle"].activation_bytes
        for values in (
            ["train.dalle.batch_size=8"],
            ["train.dalle.batch_size=16"],
            ["train.dalle.batch_size=16", "train.dalle.micro_batch_size=4"],
        )
    )
    assert 0 < cut == small / 2 == large / 4


def test_checkpointing_gradients_costs_a_second_forward_pass_and_keeps_less() -> None:
    deep = ["dalle.layers=8", "clip.image_layers=8", "clip.text_layers=8", "vae.decoder_blocks=8", "prior.layers=8"]
    deep += ["dalle.image_prefix=2", "upscale.factor=2", "upscale.blocks=8"]
    stages = (*STAGES, "prior", "upscale")
    plain, saving = (
        estimate(tiny_recipe(*deep, *(f"train.{stage}.checkpoint_gradients={asked}" for stage in stages))).stages
        for asked in ("false", "true")
    )
    assert plain.keys() == saving.keys() == set(stages)
    for stage in stages:
        assert saving[stage].train_flops == pytest.approx(plain[stage].train_flops * 4 / 3)
        before = plain[stage].activation_bytes
        assert 0.1 * before < saving[stage].activation_bytes < 0.6 * before, stage


def test_dalle_1_has_its_12_billion_parameters_and_is_never_allocated() -> None:
    recipe = Recipe.from_toml(ROOT / "configs" / "dalle1-12b.toml")
    result = estimate(recipe, devices=64)
    part = result.stages["dalle"]
    assert 12.0e9 < part.parameters < 12.4e9
    patterns = recipe.dalle.layer_patterns
    assert patterns[:4] == ("row", "column", "row", "row") and patterns[-1] == "conv" and len(patterns) == 64
    assert recipe.vae.num_codes == 8192 and recipe.text.vocab_size == 16384
    assert (result.text_length, result.image_tokens) == (256, 1024)
    assert part.device_bytes(64) < part.device_bytes(1) / 8
    assert part.hours("h200", 64) == pytest.approx(part.hours("h200") / 64)


def test_sparse_attention_is_counted_as_the_masked_full_one_that_is_computed() -> None:
    full, sparse = (
        estimate(tiny_recipe("dalle.layers=4", f"dalle.attention={attention}")) for attention in ("full", "dalle1")
    )
    assert sparse.stages["dalle"].forward_flops == full.stages["dalle"].forward_flops
    assert sparse.stages["dalle"].parameters == full.stages["dalle"].parameters
    assert sparse.cache_bytes == full.cache_bytes and sparse.draw_flops == full.draw_flops


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_estimated(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--json"]):
        with pytest.raises(SystemExit) as stopped:
            main(["estimate", "--config", str(config), *options])
        assert not stopped.value.code
    printed = capsys.readouterr().out
    facts = json.loads(printed[printed.index("{") :])
    stages = {*STAGES, "prior"} if Recipe.from_toml(config).dalle.image_prefix else {*STAGES}
    assert set(facts["hours"]) == stages and all(hours > 0 for hours in facts["hours"].values())
    assert "memory a device" in printed


def test_unknown_hardware_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", "--config", str(ROOT / "configs" / "shapes.toml"), "--hardware", "abacus"])
    assert stopped.value.code == 2
    assert f"'abacus'; known: {', '.join(ACHIEVED)}" in capsys.readouterr().err
