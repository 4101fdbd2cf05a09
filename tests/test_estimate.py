"""Estimates agree with what is built, counted and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dalle_mini_impl.cli.app import main
from dalle_mini_impl.config import STAGES, AheadCell, Recipe
from dalle_mini_impl.estimate import HARDWARE, estimate
from dalle_mini_impl.layers.attention import KVCache
from dalle_mini_impl.pretrained import build_dalle, build_vae
from dalle_mini_impl.stream import NUM_SPECIAL
from dalle_mini_impl.training.passes import StagePasses
from dalle_mini_impl.training.stages import asked_for
from dalle_mini_impl.vae.discriminator import PatchDiscriminator
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
        estimate(tiny_recipe(*values), "cpu2-fp32").stages["dalle"].activation_bytes
        for values in (
            ["train.dalle.batch_size=8", "train.dalle.micro_batch_size=9"],
            ["train.dalle.batch_size=16"],
            ["train.dalle.batch_size=16", "train.dalle.micro_batch_size=4"],
        )
    )
    assert 0 < cut == small / 2 == large / 4


def test_activations_are_in_the_precision_that_the_hardware_trains_in() -> None:
    recipe = tiny_recipe()
    brief, single, t4 = (estimate(recipe, hardware).stages["dalle"] for hardware in ("cpu2", "cpu2-fp32", "t4"))
    assert (brief.precision, single.precision, t4.precision) == ("bf16", "fp32", "fp32")
    dalle = build_dalle(recipe, StagePasses(recipe).stream)
    matrices = sum(module.weight.numel() for module in dalle.modules() if isinstance(module, nn.Linear))
    assert brief.activation_bytes == single.activation_bytes / 2 + 2 * matrices, "autograd keeps what autocast has cast"
    assert t4.activation_bytes == single.activation_bytes
    asked = estimate(tiny_recipe("train.dalle.precision=fp32")).stages["dalle"]
    assert (asked.precision, asked.activation_bytes) == ("fp32", single.activation_bytes)
    assert estimate(recipe, "t4").cache_bytes == 2 * estimate(recipe, "a100").cache_bytes


def test_autocast_leaves_copies_of_the_matrices_in_bf16_to_autograd() -> None:
    """What the estimate counts of weights, measured on a real pass."""
    dalle = build_dalle(recipe := tiny_recipe(), StagePasses(recipe).stream)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    text, ids = torch.full((1, 16), NUM_SPECIAL), torch.zeros(1, 16, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dalle(text, ids)
    for linear in (module for module in dalle.modules() if isinstance(module, nn.Linear)):
        shapes = {linear.weight.shape, linear.weight.t().shape}
        assert any(tensor.dtype == torch.bfloat16 and tensor.shape in shapes for tensor in kept.values())


def test_a_t4_has_no_bf16_and_trains_at_the_speed_of_its_fp32() -> None:
    assert HARDWARE["t4"].bf16 is None and HARDWARE["t4"].fp32 < 8.1e12
    part = estimate(tiny_recipe(), "t4").stages["dalle"]
    assert part.hours == part.train_flops / HARDWARE["t4"].fp32 / 3600
    assert estimate(tiny_recipe("train.dalle.precision=bf16"), "t4").stages["dalle"].hours == part.hours, "emulated"
    slow, fast = (
        estimate(tiny_recipe(f"train.dalle.precision={precision}"), "a100").stages["dalle"]
        for precision in ("fp32", "auto")
    )
    assert slow.hours / fast.hours == pytest.approx(125 / 7.8)


@pytest.mark.parametrize("cells", [("right",), ("right", "below")])
def test_looking_ahead_is_trained_but_not_drawn(cells: tuple[AheadCell, ...]) -> None:
    values = json.dumps(cells)
    plain, ahead = estimate(tiny_recipe()), estimate(tiny_recipe(f"dalle.look_ahead={values}"))
    one, two = plain.stages["dalle"], ahead.stages["dalle"]
    dim, codes, side = 32, 32, 4
    predicted = sum(side**2 - {"right": 1, "below": side}[cell] for cell in cells)
    assert two.forward_flops - one.forward_flops == 2 * predicted * (dim * dim + dim * codes)
    assert two.parameters - one.parameters == len(cells) * dim**2 + dim, "a map each, and a norm"
    assert two.activation_bytes > one.activation_bytes
    assert ahead.draw_flops == plain.draw_flops and ahead.cache_bytes == plain.cache_bytes


def test_each_hard_negative_is_one_more_caption_to_read() -> None:
    none, one, three = (
        estimate(tiny_recipe(f"clip.hard_negatives={number}", "train.clip.precision=fp32")).stages["clip"]
        for number in (0, 1, 3)
    )
    assert 0 < one.forward_flops - none.forward_flops == (three.forward_flops - none.forward_flops) / 3
    assert 0 < one.activation_bytes - none.activation_bytes < none.activation_bytes
    assert one.parameters == none.parameters


@pytest.mark.parametrize(("micro_batch_size", "devices"), [(8, 1), (32, 2)])
def test_a_batch_of_clip_that_is_cut_up_passes_the_towers_twice(micro_batch_size: int, devices: int) -> None:
    values = ["train.clip.batch_size=32", "clip.hard_negatives=2", "clip.caption_layers=1"]
    cut = [f"train.clip.micro_batch_size={micro_batch_size}"]
    plain, twice = (estimate(tiny_recipe(*values), devices=1), estimate(tiny_recipe(*values, *cut), devices=devices))
    no_captioner = estimate(tiny_recipe(*values, "clip.caption_layers=0")).stages["clip"]
    one, two = plain.stages["clip"], twice.stages["clip"]
    assert two.no_grad_flops == 2 * one.no_grad_flops + no_captioner.forward_flops, "decodes pictures twice, too"
    assert two.forward_flops == one.forward_flops
    more = (two.no_grad_flops - one.no_grad_flops) * two.batch_size * two.steps
    assert more > 0 and two.train_flops == pytest.approx(one.train_flops + more)


def test_a_batch_of_vq_that_is_cut_up_passes_the_encoder_twice() -> None:
    cut = ["train.vae.batch_size=8", "train.vae.micro_batch_size=4"]
    found = {
        quantizer: estimate(tiny_recipe(f"vae.quantizer={quantizer}", *cut)).stages["vae"]
        for quantizer in ("vq", "gumbel")
    }
    assert 0 < found["vq"].no_grad_flops < found["vq"].forward_flops
    assert found["gumbel"].no_grad_flops == 0
    assert estimate(tiny_recipe(*cut), devices=2).stages["vae"].no_grad_flops == 0, "4 each, in one part"


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
        one, two = plain[stage], saving[stage]
        assert one.no_grad_flops == two.no_grad_flops
        again = one.forward_flops * one.batch_size * one.steps
        assert two.train_flops == pytest.approx(one.train_flops + again)
        assert 0.1 * one.activation_bytes < two.activation_bytes < 0.6 * one.activation_bytes, stage


def test_dalle_1_has_its_12_billion_parameters_and_is_never_allocated() -> None:
    recipe = Recipe.from_toml(ROOT / "configs" / "dalle1-12b.toml")
    alone, result = (estimate(recipe, "h200", devices) for devices in (1, 64))
    part = result.stages["dalle"]
    assert 12.0e9 < part.parameters < 12.4e9
    patterns = recipe.dalle.layer_patterns
    assert patterns[:4] == ("row", "column", "row", "row") and patterns[-1] == "conv" and len(patterns) == 64
    assert recipe.vae.num_codes == 8192 and recipe.text.vocab_size == 16384
    assert (result.text_length, result.image_tokens) == (256, 1024)
    assert part.hours == pytest.approx(alone.stages["dalle"].hours / 64)
    assert 45 * 2**30 < part.whole_bytes < part.device_bytes < alone.stages["dalle"].device_bytes / 4
    assert alone.stages["dalle"].whole_bytes == alone.stages["dalle"].gathered_bytes == 0


def test_what_is_shared_out_is_whole_while_it_is_evaluated() -> None:
    values = ["dalle.dim=256", "dalle.layers=12", "train.dalle.batch_size=8", "train.dalle.optimizer=adamw"]
    alone, shared = (estimate(tiny_recipe(*values), devices=devices).stages["dalle"] for devices in (1, 8))
    whole, beside = shared.weight_bytes, shared.earlier_bytes
    assert alone.device_bytes == 5 * whole + beside + alone.activation_bytes
    assert shared.device_bytes == 5 * whole / 8 + beside + max(whole, shared.activation_bytes + shared.gathered_bytes)
    assert shared.gathered_bytes < whole, "two blocks, embeddings and heads, and their gradients"


def test_small_stages_are_whole_on_every_device(capsys: pytest.CaptureFixture[str]) -> None:
    values = ["dalle.image_prefix=2", 'train.stages=["vae","clip","vqgan","prior","dalle","distill"]']
    alone, shared = (estimate(tiny_recipe(*values), "cpu2-fp32", devices).stages for devices in (1, 2))
    for stage, part in shared.items():
        assert part.is_shared_out == (stage not in ("prior", "distill", "vqgan"))
        if not part.is_shared_out:
            assert part.whole_bytes == part.gathered_bytes == 0
            saved = alone[stage].activation_bytes - part.activation_bytes
            assert part.device_bytes == alone[stage].device_bytes - saved, stage
    said = _printed(capsys, "unclip", "--devices", "2")
    assert "one whole fp32 copy of the weights on each device" in said and "Never shared out: prior." in said
    assert "fp32 copy" not in _printed(capsys, "unclip")


def _printed(capsys: pytest.CaptureFixture[str], config: str, *options: str) -> str:
    """The output on one of the recipes for made scenes, in one line."""
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", "--config", str(ROOT / "configs" / f"shapes-{config}.toml"), *options])
    assert not stopped.value.code
    return " ".join(capsys.readouterr().out.split())


def test_vqgan_is_a_decoder_with_a_discriminator() -> None:
    values = ["data.image_size=32", 'train.stages=["vae","clip","vqgan"]']
    recipe = tiny_recipe(*values)
    stages = estimate(recipe).stages
    part, vae = stages["vqgan"], build_vae(recipe)
    discriminator = PatchDiscriminator(recipe.vqgan.discriminator_width, recipe.vqgan.discriminator_layers)
    numbers = {
        name: sum(p.numel() for p in model.parameters())
        for name, model in {"decoder": vae.decoder, "vae": vae, "discriminator": discriminator}.items()
    }
    assert part.parameters == numbers["decoder"] + numbers["discriminator"]
    assert part.weight_bytes == 4 * (numbers["vae"] + numbers["discriminator"])
    assert part.average_bytes == 4 * numbers["vae"]
    assert part.earlier_bytes == sum(stages[stage].weight_bytes for stage in ("vae", "clip", "dalle"))
    assert part.no_grad_flops > 0, "the encoder, and CLIP on true pictures"
    full = estimate(tiny_recipe(*values, "vqgan.phase=full")).stages["vqgan"]
    assert full.parameters == numbers["vae"] + numbers["discriminator"]
    both = part.forward_flops + part.no_grad_flops
    assert full.forward_flops + full.no_grad_flops == both and full.forward_flops > part.forward_flops
    blind = estimate(tiny_recipe(*values, "vqgan.perceptual=none")).stages["vqgan"]
    assert blind.no_grad_flops + blind.forward_flops < both


def test_distillation_asks_its_teacher_twice() -> None:
    stages = estimate(tiny_recipe('train.stages=["vae","dalle","distill"]', 'dalle.look_ahead=["right"]')).stages
    plain = estimate(tiny_recipe()).stages["dalle"]
    part = stages["distill"]
    assert part.forward_flops == plain.forward_flops and part.no_grad_flops == 2 * plain.forward_flops
    assert part.parameters == plain.parameters, "it doesn't look ahead"
    assert part.earlier_bytes >= stages["dalle"].weight_bytes
    assert (part.steps, part.batch_size) == (300, 64)


def test_stages_come_in_their_order_and_what_is_not_counted_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe('train.stages=["distill","vqgan","prior","upscale"]', "sampling.guidance=1", "clip.heads=1")
    result = estimate(recipe)
    assert list(result.stages) == ["vae", "clip", "dalle", "vqgan"]
    assert set(result.not_counted) == {"distill", "prior", "upscale"}
    assert "sampling.guidance is 1" in result.not_counted["distill"]
    lpips = ["--set", 'train.stages=["vqgan"]', "--set", "vqgan.perceptual=lpips"]
    said = _printed(capsys, "long", *lpips, "--set", 'vqgan.lpips_weights=["none.pt"]')
    assert "Not counted of vqgan: the network in vqgan.lpips_weights" in said
    assert "Not counted" not in _printed(capsys, "long")


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
    stages = {*STAGES, *asked_for(Recipe.from_toml(config))}
    assert set(facts["hours"]) == stages and all(hours > 0 for hours in facts["hours"].values())
    assert "memory a device" in printed


def test_devices_that_no_training_could_use_are_refused() -> None:
    """32 pictures on 64 devices were estimated at half of the hours that 32 devices take."""
    for devices, nearest in ((64, 64), (3, 33)):
        message = rf"train\.vae\.batch_size 32 can't be shared evenly by {devices} processes; use {nearest}"
        with pytest.raises(ValueError, match=message):
            estimate(tiny_recipe(), devices=devices)


def test_unknown_hardware_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", "--config", str(ROOT / "configs" / "shapes.toml"), "--hardware", "abacus"])
    assert stopped.value.code == 2
    assert f"'abacus'; known: {', '.join(HARDWARE)}" in capsys.readouterr().err
