"""Losses that don't depend on how the batch is cut up; what the batches of each stage contain."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalle_mini_impl.clip import CLIP, MAX_LOGIT_SCALE
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.data.token_cache import TokenCache
from dalle_mini_impl.data.views import shift_images
from dalle_mini_impl.stream import NULL, PAD
from dalle_mini_impl.training import evaluation
from dalle_mini_impl.training.batches import Batch, BatchOrder, split_batch
from dalle_mini_impl.training.task import EvaluationContext, StepContext, Task
from dalle_mini_impl.training.tasks import clip as clip_module
from dalle_mini_impl.training.tasks.clip import CLIPTask, _trimmed
from dalle_mini_impl.training.tasks.dalle import DALLETask
from dalle_mini_impl.training.tasks.vae import VAETask
from tests.tiny import TINY_CAPTIONS, tiny_bundle

NUM_PICTURES = 30


def data() -> PreparedData:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (NUM_PICTURES, 16, 16, 3), dtype=np.uint8)
    captions = [() if i % 10 == 9 else tuple(TINY_CAPTIONS[(i + k) % 3] for k in range(1 + i % 2)) for i in range(30)]
    splits = ["validation" if i >= 24 else "train" for i in range(NUM_PICTURES)]
    return PreparedData(pictures, [str(i) for i in range(30)], captions, splits, {}, "made")  # type: ignore[arg-type]


def token_cache(num_views: int = 1) -> TokenCache:
    tokens = np.random.default_rng(1).integers(0, 32, (num_views, NUM_PICTURES, 16)).astype(np.uint16)
    return TokenCache(tokens, 32)


def dalle_task(*overrides: str) -> DALLETask:
    bundle = tiny_bundle(*overrides)
    assert bundle.dalle is not None and bundle.vae is not None
    cache = token_cache(len(bundle.recipe.data.views))
    return DALLETask(bundle.dalle, data(), bundle.recipe, bundle.tokenizer, cache, bundle.vae)


def clip_task(*overrides: str) -> CLIPTask:
    bundle = tiny_bundle(*overrides)
    assert bundle.clip is not None and bundle.vae is not None
    decoder = (bundle.vae, token_cache())
    return CLIPTask(bundle.clip, data(), bundle.recipe, bundle.tokenizer, Accelerator(cpu=True), decoder)


def vae_task(*overrides: str) -> VAETask:
    bundle = tiny_bundle("vae.quantizer=fsq", *overrides)
    assert bundle.vae is not None
    return VAETask(bundle.vae, data(), bundle.recipe)


def vq_task(*overrides: str) -> VAETask:
    """With a codebook that is in use already, and a balance term that matters."""
    task = vae_task("vae.quantizer=vq", "vae.balance_weight=1", "vae.quantize_after=0", *overrides)
    task.model.train()
    step(task, 0, None)
    return task


def batch_of(task: Task, size: int = 12, step: int = 0) -> Batch:
    order = BatchOrder(task.num_items, size, seed=0)
    positions = order.positions(step)
    return task.batch(order.items(positions), positions)


def gradients(
    task: Task, batch: Batch, micro_batch_size: int | None, progress: float = 0.5
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of a batch cut into micro-batches, as the loop computes them."""
    model: nn.Module = task.model.train()
    model.zero_grad()
    counts = task.counts(batch)
    metrics: dict[str, float] = {}
    parts = list(split_batch(batch, micro_batch_size))
    contexts = [StepContext(counts, progress, torch.Generator().manual_seed(0), part) for part in parts]
    for part, context in zip(task.before_step(model, parts, contexts), contexts, strict=True):
        loss, values = task.loss(model, part, context)
        loss.backward()
        for name, value in {"loss": loss, **values}.items():
            metrics[name] = metrics.get(name, 0.0) + value.item()
    return metrics, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(task: Task, number: int, micro_batch_size: int | None) -> None:
    """A step without an optimizer: what it changes is learned without a gradient."""
    gradients(task, batch_of(task, step=number), micro_batch_size)
    task.after_step(task.model, torch.Generator().manual_seed(number))


def clip_task_with_hard_negatives(loss: str = "infonce") -> CLIPTask:
    return clip_task("clip.hard_negatives=2", f"clip.loss={loss}")


CLIP_TASKS = [
    clip_task,
    lambda: clip_task("clip.loss=siglip"),
    clip_task_with_hard_negatives,
    lambda: clip_task_with_hard_negatives("siglip"),
    lambda: clip_task("clip.caption_layers=1", "clip.hard_negatives=1"),
]


def reading_task() -> DALLETask:
    return dalle_task("dalle.reading_share=0.25")


def looking_task(*overrides: str) -> DALLETask:
    task = dalle_task('dalle.look_ahead=["right", "below"]', *overrides)
    torch.manual_seed(0)
    cast(DALLE, task.model).learn_to_look_ahead()
    return task


def featured_task() -> DALLETask:
    task = dalle_task("dalle.code_features=true")
    cast(DALLE, task.model).learn_by_features(task.vae.code_vectors())
    return task


@pytest.mark.parametrize(
    "make", [vae_task, vq_task, *CLIP_TASKS, dalle_task, reading_task, looking_task, featured_task]
)
@pytest.mark.parametrize("micro_batch_size", [1, 5])
def test_cutting_a_batch_up_changes_neither_loss_nor_gradient(make: Callable[[], Any], micro_batch_size: int) -> None:
    task = make()
    batch = batch_of(task)
    whole_metrics, whole = gradients(task, batch, None)
    cut_metrics, cut = gradients(task, batch, micro_batch_size)
    assert cut_metrics == pytest.approx(whole_metrics, rel=1e-4, abs=1e-6)
    assert whole.keys() == cut.keys()
    for name, gradient in whole.items():
        assert torch.allclose(cut[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-7), name


@pytest.mark.parametrize("micro_batch_size", [1, 5])
def test_cutting_a_batch_up_changes_neither_start_nor_course_of_the_codebook(micro_batch_size: int) -> None:
    whole, cut = (vae_task("vae.quantizer=vq", "vae.dead_code_share=0.5") for _ in range(2))
    for number in range(4):
        step(whole, number, None)
        step(cut, number, micro_batch_size)
        expected = whole.model.state_dict()
        for name, value in cut.model.state_dict().items():
            assert torch.allclose(value, expected[name], atol=1e-4), (name, number)
    assert expected["quantizer.updates"].item() == 4


@pytest.mark.parametrize("make", [vae_task, clip_task, clip_task_with_hard_negatives, dalle_task, reading_task])
def test_batches_are_functions_of_their_place_alone(make: Callable[[], Any]) -> None:
    task, again = make(), make()
    for step in (3, 0):
        first, second = batch_of(task, step=step), batch_of(again, step=step)
        assert all(torch.equal(first[name], second[name]) for name in first)
    order = BatchOrder(task.num_items, 12, seed=0)
    halves = [order.positions(3, rank, 2) for rank in (0, 1)]
    parts = [task.batch(order.items(half), half) for half in halves]
    whole = batch_of(task, step=3)
    assert all(torch.equal(torch.cat([part[name] for part in parts]), whole[name]) for name in whole)


def test_clip_reads_no_slot_that_nobody_needs() -> None:
    task = clip_task("clip.caption_layers=1", "clip.hard_negatives=1")
    captions, changed = ["red", "star"], ["a red circle", "a blue star"]
    model, length = task.model.eval(), task.text_length
    text, negatives = (task.tokenizer.batch(rows, length)[0] for rows in (captions, changed))
    longest = int((negatives != PAD).sum(dim=1).max())
    assert int((text != PAD).sum(dim=1).max()) < longest < length
    batch = {"text": text, "negatives": negatives[:, None]}
    trimmed = _trimmed(batch)
    assert trimmed["text"].shape == (2, longest) and trimmed["negatives"].shape == (2, 1, longest)
    losses = []
    for part in (batch, trimmed):
        images, keys = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(4)
        with torch.no_grad():
            losses.append(model.loss(images, part["text"], keys[:2], part["negatives"][:, 0], keys[2:])[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_captions_are_dropped_at_the_rate_the_recipe_says() -> None:
    task = dalle_task("dalle.caption_dropout=0.3")
    dropped = total = 0
    for step in range(100):
        positions = BatchOrder(task.num_items, 12, seed=0).positions(step)
        items = BatchOrder(task.num_items, 12, seed=0).items(positions)
        text = task.batch(items, positions)["text"]
        captioned = torch.tensor([bool(task.data.captions[i]) for i in task.data.train[items]])
        is_null = (text == NULL).all(dim=1)
        assert bool(is_null[~captioned].all())  # pictures without a caption train the null caption
        dropped, total = dropped + int(is_null[captioned].sum()), total + int(captioned.sum())
    assert dropped / total == pytest.approx(0.3, abs=0.05)


def test_corruption_touches_inputs_at_its_rate_and_targets_never() -> None:
    task = dalle_task("dalle.token_corruption=0.2")
    batches = [batch_of(task, size=24, step=step) for step in range(40)]
    changed = torch.cat([(batch["inputs"] != batch["ids"]).flatten() for batch in batches]).float().mean().item()
    assert changed == pytest.approx(0.2 * 31 / 32, abs=0.02)
    stored = {tuple(row) for row in task.cache.tokens[0].tolist()}
    assert all(tuple(row) in stored for batch in batches for row in batch["ids"].tolist())
    clean = dalle_task("dalle.token_corruption=0")
    assert torch.equal(batch_of(clean)["inputs"], batch_of(clean)["ids"])


def test_each_view_comes_with_its_own_ids() -> None:
    task = dalle_task('data.views=["plain", "flip"]', "dalle.token_corruption=0")
    order = BatchOrder(task.num_items, 24, seed=0)
    positions = order.positions(0)
    items = order.items(positions)
    batch = task.batch(items, positions)
    expected = task.cache.tokens[batch["view"].numpy(), task.data.train[items]]
    assert np.array_equal(batch["ids"].numpy(), expected)
    assert set(batch["view"].tolist()) == {0, 1}


def test_a_vae_of_moved_views_is_trained_on_moved_pictures() -> None:
    plain, moving = vae_task(), vae_task('data.views=["plain", "up_left"]')
    images = batch_of(plain)["pixels"].permute(0, 3, 1, 2).float()
    pictures = batch_of(moving)["pixels"].permute(0, 3, 1, 2).float()
    moves = torch.tensor([(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)])  # 16 pixels: by one at most
    seen = set()
    for image, picture in zip(images, pictures, strict=True):
        candidates = shift_images(image.expand(9, -1, -1, -1), moves, limit=1)
        found = [place for place in range(9) if torch.equal(candidates[place], picture)]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) > 3
    assert torch.equal(batch_of(moving)["pixels"], batch_of(moving)["pixels"]), "a pure function of the position"


@pytest.mark.parametrize("share", [0.3, 0.4, 1 / 3, 0.5])
def test_as_many_samples_are_read_as_the_recipe_says(share: float) -> None:
    reads = dalle_task(f"dalle.reading_share={share}")._reads(np.arange(10_000))
    assert int(reads.sum()) == pytest.approx(10_000 * share, abs=1)
    assert bool(reads[0]) and max(np.diff(np.flatnonzero(reads))) <= math.ceil(1 / share)


def test_captions_are_only_read_through_for_changes_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(clip_module, "CaptionChanger", lambda captions: read.append(len(list(captions))))
    clip_task()
    clip_task("clip.hard_negatives=1")
    assert read[0] == 0 < read[1]


def test_a_scale_beyond_its_limit_comes_back_to_it() -> None:
    task = clip_task()
    model = cast(CLIP, task.model)
    with torch.no_grad():
        model.logit_scale.fill_(50.0)
    task.after_step(model, torch.Generator())
    assert model.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)
    model.contrast(torch.eye(2, 8), torch.eye(2, 8).flip(0), torch.arange(2), torch.arange(2)).backward()
    assert model.logit_scale.grad is not None and model.logit_scale.grad.item() > 0


def test_every_fourth_sample_is_read_and_keeps_its_caption() -> None:
    task = dalle_task("dalle.reading_share=0.25", "dalle.caption_dropout=1.0")
    batch = batch_of(task)
    assert batch["reads"].tolist() == [place % 4 == 0 for place in range(12)]
    assert ((batch["text"] == NULL).any(dim=1) == ~batch["reads"]).all(), "what is read is never dropped"
    metrics, gradient = gradients(task, batch, None)
    assert metrics["loss"] == pytest.approx(
        0.25 * metrics["read_nll"] + 0.75 * (metrics["text_nll"] / 8 + metrics["image_nll"] * 7 / 8), rel=1e-4
    )
    assert gradient["reading.weight"].abs().max() > 0


@pytest.mark.parametrize("micro_batch_size", [12, 5])
def test_before_reading_begins_all_pictures_are_drawn(micro_batch_size: int) -> None:
    later, never = dalle_task("dalle.reading_share=0.25", "dalle.reading_after=0.6"), dalle_task()
    never.model.load_state_dict({k: v for k, v in later.model.state_dict().items() if k != "reading.weight"})
    batch = batch_of(later)
    assert batch["reads"].any()
    metrics, gradient = gradients(later, batch, micro_batch_size)  # half of the run is over
    drawn, expected = gradients(never, {**batch, "reads": torch.zeros(12, dtype=torch.bool)}, None)
    assert metrics == pytest.approx(drawn, rel=1e-4) and "read_nll" not in metrics
    assert gradient.pop("reading.weight").abs().max() == 0
    for name, value in expected.items():
        assert torch.allclose(gradient[name], value, atol=1e-5), name
    begun, _ = gradients(dalle_task("dalle.reading_share=0.25", "dalle.reading_after=0.5"), batch, None)
    assert begun["read_nll"] > 0


def test_the_dalle_loss_weighs_the_means_of_text_and_image() -> None:
    task = dalle_task()
    batch = batch_of(task)
    metrics, _ = gradients(task, batch, None)
    assert metrics["loss"] == pytest.approx(metrics["text_nll"] / 8 + metrics["image_nll"] * 7 / 8, rel=1e-4)
    not_null = ~(batch["text"] == NULL).all(dim=1)
    assert task.counts(batch).tolist() == [[int((batch["text"][not_null][:, 1:] != PAD).sum()), 12 * 16], [0, 0]]


def test_cells_further_on_are_weighed_beside_the_next_one() -> None:
    task = looking_task("dalle.look_ahead_weight=0.4")
    metrics, _ = gradients(task, batch_of(task), None)
    drawn = metrics["image_nll"] + 0.4 * metrics["ahead_nll"]
    assert metrics["loss"] == pytest.approx(metrics["text_nll"] / 8 + drawn * 7 / 8, rel=1e-4)


def test_clip_trains_on_captioned_pictures_and_decodes_its_share() -> None:
    task = clip_task("clip.reconstructed_share=0.5")
    assert all(task.data.captions[i] for i in task.captioned) and task.num_items == 22
    decoded = torch.cat([batch_of(task, step=step)["decoded"] for step in range(50)])
    assert decoded.float().mean().item() == pytest.approx(0.5, abs=0.07)
    batch = batch_of(task)
    assert task.decoder is not None
    task.max_shift = 0
    images = task._images(batch, batch)
    expected = task.decoder[0].decode(batch["ids"])
    plain = batch["pixels"].permute(0, 3, 1, 2) / 255
    assert torch.allclose(images, torch.where(batch["decoded"][:, None, None, None], expected, plain))


def test_clip_is_evaluated_where_no_held_out_picture_has_a_caption(tmp_path: Path) -> None:
    bundle = tiny_bundle()
    assert bundle.clip is not None
    uncaptioned = data()
    for index in uncaptioned.validation:
        uncaptioned.captions[index] = ()
    accelerator = Accelerator(cpu=True)
    task = CLIPTask(bundle.clip, uncaptioned, bundle.recipe, bundle.tokenizer, accelerator, None)
    with torch.no_grad():
        metrics = task.evaluate(bundle.clip, EvaluationContext(accelerator, tmp_path, 1, None))
    assert metrics["num_pairs"] == len(TINY_CAPTIONS)


def test_equal_captions_have_equal_keys() -> None:
    task = clip_task()
    batch = batch_of(task)
    assert len(set(batch["keys"].tolist())) == 3  # TINY_CAPTIONS


def test_shifting_moves_pictures_and_repeats_their_border() -> None:
    images = torch.arange(32.0).view(2, 1, 4, 4).expand(2, 3, 4, 4)
    moved = shift_images(images, torch.tensor([[1, 0], [0, -2]]), limit=2)
    assert torch.equal(moved[0, 0, 1:], images[0, 0, :3]) and torch.equal(moved[0, 0, 0], images[0, 0, 0])
    assert torch.equal(moved[1, 0, :, :2], images[1, 0, :, 2:]) and torch.equal(moved[1, 0, :, 3], images[1, 0, :, 3])


def test_held_out_pictures_are_the_validation_split_and_training_ones_where_there_is_none() -> None:
    made = data()
    assert evaluation.held_out(made).tolist() == list(range(24, 30))
    made.validation = np.empty(0, dtype=np.int64)
    assert set(evaluation.held_out(made)) <= set(made.train)


def test_held_out_pictures_are_compared_with_as_many_that_were_trained_on(tmp_path: Path) -> None:
    task = dalle_task()
    context = EvaluationContext(Accelerator(cpu=True), tmp_path, step=1, dtype=None)
    parts = (task.tokenizer, task.cache, context)
    dalle = cast(DALLE, task.model).eval()
    with torch.no_grad():
        torch.nn.init.normal_(dalle.image_head.weight, std=0.5)
        metrics = task.evaluate(dalle, context)
        for indices, name in ((task.held_out, "image_nll"), (task.trained_on, "image_nll_trained_on")):
            ids, captions = task.cache.ids(indices), [(*task.data.captions[i], None)[0] for i in indices]
            by_hand = -dalle.token_log_likelihoods(task.tokenizer.batch(captions, dalle.stream.text_length)[0], ids)
            assert metrics[name] == pytest.approx(by_hand.mean().item(), rel=1e-5)
            assert evaluation.image_nll(dalle, task.data, indices, *parts) == pytest.approx(metrics[name])
        ids, texts = task.cache.ids(task.held_out), [(*task.data.captions[i], None)[0] for i in task.held_out]
        logits = dalle(task.tokenizer.batch(texts, dalle.stream.text_length)[0], ids)[1]
        assert metrics["image_accuracy"] == pytest.approx((logits.argmax(dim=-1) == ids).float().mean().item())
        assert 0 < metrics["image_accuracy"] < 1
    assert len(task.trained_on) == len(task.held_out) and set(task.trained_on) <= set(task.data.train)
    assert metrics["image_nll_trained_on"] != metrics["image_nll"]
    task.data.validation = np.empty(0, dtype=np.int64)
    assert len(evaluation.trained_on(task.data)) == 0


def test_swapped_captions_read_differently() -> None:
    made = data()
    others = evaluation._other_captions(made, made.validation)
    assert set(others) == {24, 25, 26, 27, 28}  # 29 has no caption
    assert all(other != made.captions[index][0] for index, other in others.items())


def test_a_caption_gain_that_cant_be_measured_is_not_zero(tmp_path: Path) -> None:
    task = dalle_task()
    context = EvaluationContext(Accelerator(cpu=True), tmp_path, step=1, dtype=None)

    def measure() -> dict[str, float]:
        with torch.no_grad():
            return evaluation.likelihood(
                cast(DALLE, task.model), task.data, task.held_out, task.tokenizer, task.cache, context
            )

    assert measure()["caption_gain"] != 0
    for index in task.held_out:
        task.data.captions[index] = ("a red circle",)
    assert measure().keys() == {"image_nll", "image_bits", "image_accuracy", "text_nll"}


def test_recall_counts_ties_against_the_model() -> None:
    assert evaluation._recall(torch.eye(4), 1) == 1.0
    assert evaluation._recall(torch.ones(4, 4), 1) == 0.0
    assert evaluation._recall(torch.eye(4).flip(0), 4) == 1.0
