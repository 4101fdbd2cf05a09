"""The discriminator's side: signs of every adversarial loss, augmentations that let gradients through, perception."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dalle_mini_impl.config import Augmentation, Recipe
from dalle_mini_impl.vae.augment import NUM_DRAWS, diff_augment
from dalle_mini_impl.vae.discriminator import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
)
from dalle_mini_impl.vae.perceptual import LPIPS, VGG16_CONVOLUTIONS, layer_distance, load_lpips
from tests.tiny import tiny_bundle

Kind = Literal["hinge", "nonsaturating"]
KINDS: tuple[Kind, ...] = ("hinge", "nonsaturating")
ALL: tuple[Augmentation, ...] = ("colour", "translation", "cutout")


def _rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _logits(value: float) -> Tensor:
    return torch.full((2, 1, 3, 3), value, requires_grad=True)


# --- losses ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [-0.5, 0.0, 0.5])
def test_the_decoder_wants_its_pictures_to_look_real(kind: Kind, value: float) -> None:
    fake = _logits(value)
    generator_loss(fake, kind).backward()
    assert fake.grad is not None and bool((fake.grad < 0).all()), "a higher logit must cost less"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [-0.5, 0.0, 0.5])
def test_the_discriminator_wants_real_logits_high_and_fake_ones_low(kind: Kind, value: float) -> None:
    real, fake = _logits(value), _logits(value)
    discriminator_loss(real, fake, kind).backward()
    assert real.grad is not None and bool((real.grad < 0).all())
    assert fake.grad is not None and bool((fake.grad > 0).all())
    right = discriminator_loss(_logits(2.0), _logits(-2.0), kind)
    wrong = discriminator_loss(_logits(-2.0), _logits(2.0), kind)
    assert right < wrong


def test_the_hinge_is_content_beyond_its_margin() -> None:
    assert discriminator_loss(_logits(1.5), _logits(-1.5), "hinge").item() == 0
    assert discriminator_loss(_logits(0.0), _logits(0.0), "hinge").item() == 1


def test_lecam_pulls_logits_to_the_other_sides_anchor() -> None:
    real, fake = _logits(2.0), _logits(-2.0)
    lecam_penalty(real, fake, torch.tensor(1.0), torch.tensor(-1.0)).backward()
    assert real.grad is not None and bool((real.grad > 0).all()), "real logits far above the fake anchor come down"
    assert fake.grad is not None and bool((fake.grad < 0).all()), "fake logits far below the real anchor come up"
    assert lecam_penalty(_logits(-2.0), _logits(2.0), torch.tensor(1.0), torch.tensor(-1.0)).item() == 0


@pytest.mark.parametrize(("layers", "pixels"), [(0, 7), (1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_as_many_pixels_as_the_docs_say(layers: int, pixels: int) -> None:
    discriminator = PatchDiscriminator(4, layers)
    images = _rand(1, 3, 128, 128).requires_grad_()
    logits = discriminator(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert images.grad is not None
    seen = images.grad[0].abs().sum(dim=0) > 0
    assert (int(seen.any(dim=0).sum()), int(seen.any(dim=1).sum())) == (pixels, pixels)


def test_pictures_of_a_batch_are_judged_apart() -> None:
    discriminator, images = PatchDiscriminator(4, 2), _rand(3, 3, 32, 32)
    alone = torch.cat([discriminator(image[None]) for image in images])
    assert torch.allclose(discriminator(images), alone, atol=1e-6)
    with pytest.raises(ValueError, match=r"8 pixels are too small for 2 layers.*discriminator_layers"):
        discriminator(_rand(1, 3, 8, 8))


# --- augmentation ---


def test_equal_draws_change_pictures_alike_and_others_differently() -> None:
    image = _rand(1, 3, 16, 16) - 0.5
    draws = _rand(2, NUM_DRAWS, seed=1)
    same = diff_augment(image.expand(2, -1, -1, -1), draws[:1].expand(2, -1), ALL)
    assert torch.equal(same[0], same[1])
    other = diff_augment(image.expand(2, -1, -1, -1), draws, ALL)
    assert not torch.allclose(other[0], other[1])
    assert torch.equal(diff_augment(image, draws[:1], ()), image)
    with pytest.raises(ValueError, match="draws have shape"):
        diff_augment(image, draws, ALL)


@pytest.mark.parametrize("kind", ALL)
def test_each_change_is_differentiable_and_does_something(kind: Augmentation) -> None:
    images = (_rand(8, 3, 16, 16) - 0.5).double().requires_grad_()
    draws = _rand(8, NUM_DRAWS, seed=2)
    changed = diff_augment(images, draws, (kind,))
    assert not torch.allclose(changed, images)
    (grad,) = torch.autograd.grad(changed.square().sum(), images)
    assert bool((grad.flatten(1).abs().sum(dim=1) > 0).all())
    small = images[:1, :, :6, :6].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, draws[:1], (kind,)), small)


def test_translation_moves_what_it_says_and_fills_with_grey() -> None:
    image = torch.ones(1, 3, 16, 16)
    draws = torch.zeros(1, NUM_DRAWS)
    draws[0, 4] = 0.999
    moved = diff_augment(image, draws, ("translation",))[0, 0]  # 2 pixels up and 2 to the right
    assert bool((moved[-2:] == 0).all()) and bool((moved[:, :2] == 0).all())
    assert bool((moved[:-2, 2:] == 1).all())


def test_the_cut_out_is_a_square_of_half_the_side() -> None:
    draws = torch.full((1, NUM_DRAWS), 0.5)
    cut = diff_augment(torch.ones(1, 3, 16, 16), draws, ("cutout",))[0, 0]
    assert int((cut == 0).sum()) == 64 and bool((cut[4:12, 4:12] == 0).all())


def test_the_middle_of_the_draws_leaves_colours_alone() -> None:
    image = _rand(1, 3, 16, 16) - 0.5
    assert torch.allclose(diff_augment(image, torch.full((1, NUM_DRAWS), 0.5), ("colour",)), image, atol=1e-6)


# --- perception ---


def test_clips_layers_tell_pictures_apart_and_give_a_gradient_to_one_side_only() -> None:
    clip = tiny_bundle().clip
    assert clip is not None
    clip.requires_grad_(False)
    images, others = _rand(2, 3, 16, 16).requires_grad_(), _rand(2, 3, 16, 16, seed=1).requires_grad_()
    layers = clip.image_tower.features(images)
    assert len(layers) == 1 + sum(isinstance(layer, torch.nn.ReLU) for layer in clip.image_tower.stem)
    distance = layer_distance(clip.image_tower.features, images, others)
    assert distance > 0 and layer_distance(clip.image_tower.features, images, images).item() == 0
    distance.backward()
    assert images.grad is None and others.grad is not None and bool((others.grad != 0).any())


def _vgg(widths: tuple[int, ...] = (2, 3, 4, 5, 6), layout: str = "features.{place}.{kind}") -> dict[str, Tensor]:
    """Made weights of VGG16 in small, with heads."""
    weights, channels = {}, 3
    for number, (block, width) in enumerate(zip(VGG16_CONVOLUTIONS, widths, strict=True)):
        for place in block:
            name = layout.format(place=place, block=number + 1, kind="{kind}")
            weights[name.format(kind="weight")] = _rand(width, channels, 3, 3, seed=place) - 0.4
            weights[name.format(kind="bias")] = _rand(width, seed=place + 50) - 0.5
            channels = width
        weights[f"lin{number}.model.1.weight"] = _rand(1, width, 1, 1, seed=number + 90)
    return weights


def test_lpips_is_vgg16_in_its_order_with_its_heads() -> None:
    """Against torch's own layers, put together as torchvision's vgg16.features."""
    weights = _vgg()
    lpips, images, others = LPIPS(weights), _rand(2, 3, 32, 32), _rand(2, 3, 32, 32, seed=1)
    taps = {block[-1] + 1: number for number, block in enumerate(VGG16_CONVOLUTIONS)}

    def slow(pictures: Tensor) -> list[Tensor]:
        x = (2 * pictures - 1 - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(3, 1, 1)
        found = []
        for place in range(30):
            if place in (4, 9, 16, 23):
                x = torch.nn.functional.max_pool2d(x, 2, 2)
            elif f"features.{place}.weight" in weights:
                x = torch.nn.functional.conv2d(
                    x, weights[f"features.{place}.weight"], weights[f"features.{place}.bias"], padding=1
                )
            else:
                x = x.relu()
            if place in taps:
                found.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return found

    expected = sum(
        torch.nn.functional.conv2d((a - b).square(), weights[f"lin{number}.model.1.weight"]).mean()
        for number, (a, b) in enumerate(zip(slow(images), slow(others), strict=True))
    )
    assert isinstance(expected, Tensor)
    assert lpips(images, others).item() == pytest.approx(expected.item(), rel=1e-5)
    assert lpips(images, images).item() == 0
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_lpips_weights_load_from_either_layout_and_kind_of_file(tmp_path: Path) -> None:
    weights = _vgg()
    heads = {name: tensor for name, tensor in weights.items() if name.startswith("lin")}
    body = {name: tensor for name, tensor in weights.items() if not name.startswith("lin")}
    save_file(body, tmp_path / "vgg16.safetensors")
    torch.save(heads, tmp_path / "heads.pth")
    torch.save(_vgg(layout="net.slice{block}.{place}.{kind}"), tmp_path / "lpips.pth")
    images, others = _rand(1, 3, 16, 16), _rand(1, 3, 16, 16, seed=1)
    expected = LPIPS(weights)(images, others)
    parts = load_lpips([tmp_path / "vgg16.safetensors", tmp_path / "heads.pth"])
    assert torch.equal(parts(images, others), expected)
    assert torch.equal(load_lpips([tmp_path / "lpips.pth"])(images, others), expected)


def test_files_that_hold_no_lpips_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no weights at .*nowhere\.pth"):
        load_lpips([tmp_path / "nowhere.pth"])
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.safetensors can't be read"):
        load_lpips([tmp_path / "broken.safetensors"])
    weights = _vgg()
    del weights["lin3.model.1.weight"]
    torch.save(weights, tmp_path / "headless.pth")
    with pytest.raises(ValueError, match=r"headless\.pth: .*lin3 missing"):
        load_lpips([tmp_path / "headless.pth"])
    torch.save({"model": torch.nn.ReLU}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code\.pth holds something else|code\.pth can't be read"):
        load_lpips([tmp_path / "code.pth"])
    weights = _vgg() | {"lin0.model.1.weight": _rand(1, 7, 1, 1)}
    with pytest.raises(ValueError, match="head 0 has 7 weights for 2 channels"):
        LPIPS(weights)
    with pytest.raises(ValueError, match="at least 16 pixels"):
        LPIPS(_vgg())(_rand(1, 3, 8, 8), _rand(1, 3, 8, 8))


def test_lpips_and_its_files_go_together() -> None:
    with pytest.raises(ValueError, match='"lpips" needs files'):
        Recipe.parse({}, ['vqgan.perceptual="lpips"'])
    with pytest.raises(ValueError, match="the others take none"):
        Recipe.parse({}, ['vqgan.lpips_weights=["x.pth"]'])
