"""Faults forbidden here: targets spread over codes that look unlike, never sharpened again, or without a gradient."""

from __future__ import annotations

import pytest
import torch

from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.pretrained import build_vae
from dalle_mini_impl.training.soft_targets import ENDS_AT, code_likeness, soft_share
from dalle_mini_impl.training.task import StepContext
from tests.test_training_tasks import batch_of, dalle_task, gradients
from tests.tiny import tiny_recipe

QUANTIZERS = [
    ("vae.quantizer=vq",),
    ("vae.quantizer=fsq", "vae.fsq_levels=[4,3,2]"),
    ("vae.quantizer=gumbel", "vae.reconstruction=logit_laplace"),
]


@pytest.mark.parametrize("settings", QUANTIZERS, ids=lambda settings: settings[0])
def test_targets_are_spread_over_what_looks_alike_to_the_decoder(settings: tuple[str, ...]) -> None:
    vae = build_vae(tiny_recipe(*settings)).eval()
    likeness = code_likeness(vae)
    size = vae.num_codes
    assert likeness.shape == (size, size)
    assert torch.allclose(likeness.sum(dim=1), torch.ones(size), atol=1e-5)
    assert torch.equal(likeness.argmax(dim=1), torch.arange(size)), "no code is more like another than like itself"
    vectors = vae.quantizer.vectors(torch.arange(size)[None], 1)[0, :, 0].t()
    distances = torch.cdist(vectors, vectors)
    for code in range(0, size, 5):
        by_distance = likeness[code][distances[code].argsort(stable=True)]
        assert (by_distance.diff() <= 1e-6).all(), "nearer codes get no less"


def test_codes_that_are_one_to_the_decoder_share_a_target_equally() -> None:
    vae = build_vae(tiny_recipe("vae.quantizer=vq")).eval()
    vae.quantizer.codebook[3] = vae.quantizer.codebook[7]
    likeness = code_likeness(vae)
    assert torch.allclose(likeness[3, 3], likeness[3, 7]) and torch.allclose(likeness[7], likeness[3])


def test_the_share_falls_to_nothing_at_the_middle_of_the_run() -> None:
    assert soft_share(0.5, 0.0) == 0.5
    assert soft_share(0.5, ENDS_AT / 2) == pytest.approx(0.25)
    assert soft_share(0.5, ENDS_AT) == soft_share(0.5, 1.0) == 0.0


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.5, 0.9])
def test_the_loss_mixes_hard_and_spread_targets(progress: float) -> None:
    task = dalle_task("dalle.soft_targets=0.4", "dalle.token_corruption=0", "dalle.caption_dropout=0")
    batch = batch_of(task, 6)
    assert isinstance(task.model, DALLE) and task.likeness is not None
    logits = task.model(batch["text"], batch["ids"])[1].float().log_softmax(dim=-1)
    hard = -logits.gather(-1, batch["ids"][..., None]).mean()
    spread = -(task.likeness[batch["ids"]] * logits).sum(dim=-1).mean()
    counts = task.counts(batch)
    loss, parts = task.loss(task.model, batch, StepContext(counts, progress, torch.Generator(), batch))
    share = soft_share(0.4, progress)
    expected = 0.875 * ((1 - share) * hard + share * spread) + 0.125 * parts["text_nll"]
    assert torch.allclose(loss, expected, atol=1e-5)
    assert torch.allclose(parts["image_nll"], hard, atol=1e-5), "the log keeps the loss of the codes themselves"
    assert ("soft_nll" in parts) == (share > 0)
    if share:
        assert torch.allclose(parts["soft_nll"], spread, atol=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 5])
def test_cutting_a_batch_up_changes_nothing(micro_batch_size: int) -> None:
    task = dalle_task("dalle.soft_targets=0.8", "text.slot_step=4")
    batch = batch_of(task)
    whole, whole_gradients = gradients(task, batch, None, progress=0.1)
    parts, part_gradients = gradients(task, batch, micro_batch_size, progress=0.1)
    assert "soft_nll" in whole
    assert whole == pytest.approx(parts, rel=1e-4)
    for name, gradient in whole_gradients.items():
        assert torch.allclose(part_gradients[name], gradient, atol=1e-5), name
