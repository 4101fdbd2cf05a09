"""Faults of drawing by picture embeddings: caches that forget them, null branches that know them, wrong rates."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_mini_impl.config import DALLEConfig, SamplingConfig
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.data.embedding_cache import EmbeddingCache, embedding_fingerprint
from dalle_mini_impl.data.token_cache import images_from_pixels
from dalle_mini_impl.decoding import Branches
from dalle_mini_impl.engine import Engine
from dalle_mini_impl.filters import choose, guidance_scales
from dalle_mini_impl.layers.prefix import ImagePrefix
from dalle_mini_impl.noise import gumbel_noise, noise_key
from dalle_mini_impl.sampling import every_row, log_likelihood_ratio, sample_rows
from dalle_mini_impl.stream import NULL, PAD, Stream
from dalle_mini_impl.training.batches import BatchOrder
from dalle_mini_impl.training.tasks.dalle import DALLETask
from tests.test_training_tasks import batch_of, data, gradients, token_cache
from tests.tiny import randomize, tiny_bundle

STREAM = Stream(text_length=6, grid_size=3, text_vocab=20, image_vocab=11, image_prefix=2)
N, E = STREAM.num_image_tokens, 5
GUIDED = SamplingConfig(guidance=3.0, top_p=0.95, precision="fp32")
UNGUIDED = SamplingConfig(guidance=1.0, top_p=1.0, precision="fp32")


def _dalle(stream: Stream = STREAM, **values: object) -> DALLE:
    config = DALLEConfig.model_validate({"dim": 16, "layers": 2, "heads": 2, "image_prefix": 2, **values})
    dalle = DALLE(config, stream, embed_dim=E)
    randomize(dalle)
    return dalle.eval()


def _captions(stream: Stream = STREAM) -> Tensor:
    pieces: list[list[int]] = [[7, 9], [7, 8, 9, 10], []]
    return torch.tensor([*(stream.fit_caption(ids)[0] for ids in pieces), stream.null_caption().tolist()])


def _embeddings(count: int = 4) -> Tensor:
    """Unit vectors, the second of them missing."""
    vectors = F.normalize(torch.randn(count, E, generator=torch.Generator().manual_seed(5)), dim=1)
    vectors[1] = 0
    return vectors


def _images(batch: int = 4) -> Tensor:
    return torch.randint(0, STREAM.image_vocab, (batch, N), generator=torch.Generator().manual_seed(6))


@torch.no_grad()
def test_what_an_embedding_becomes_doesnt_depend_on_the_others() -> None:
    prefix = ImagePrefix(128, 4, 64).eval()
    vectors = F.normalize(torch.randn(16, 128, generator=torch.Generator().manual_seed(1)), dim=1)
    together = prefix(vectors, 16)
    for count in (1, 2, 3, 5):
        assert torch.equal(prefix(vectors[:count], count), together[:count])
    assert torch.allclose(together, prefix.train()(vectors, 16), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("slot_step", [None, 2])
@pytest.mark.parametrize("chunks", [[1] * (N - 1), [N - 1], [2, 1, 4, 1]], ids=str)
def test_cached_and_packed_logits_equal_uncached_ones_with_a_prefix(slot_step: int | None, chunks: list[int]) -> None:
    stream = dataclasses.replace(STREAM, slot_step=slot_step)
    dalle, images, embeddings = _dalle(stream), _images(), _embeddings()
    for rows, text in stream.groups(_captions(stream)):
        for given in (embeddings[rows], None):
            expected = dalle(text, images[rows], None, given)[1]
            engine = Engine(dalle)
            (first, cache), (packed, packed_cache) = dalle.prefill(text, embedding=given), engine.prefill(text, given)
            for logits in (first, packed):
                assert torch.allclose(logits, expected[:, 0], atol=1e-5)
            start = 0
            for count in chunks:
                part = images[rows, start : start + count]
                for logits in (dalle.extend(part, cache), engine.extend(part, packed_cache)):
                    assert torch.allclose(logits, expected[:, start + 1 : start + 1 + count], atol=1e-5)
                start += count


@torch.no_grad()
def test_a_row_of_zeros_says_as_little_as_no_embedding() -> None:
    dalle, text, images, embeddings = _dalle(), _captions(), _images(), _embeddings()
    none, given = dalle(text, images)[1], dalle(text, images, None, embeddings)[1]
    assert torch.equal(given[1], none[1])
    for row in (0, 2, 3):
        assert not torch.allclose(given[row, 0], none[row, 0], atol=1e-3)


@torch.no_grad()
def test_text_is_predicted_from_its_own_slots_behind_the_prefix() -> None:
    dalle, text, images, embeddings = _dalle(), _captions()[:2], _images(2), _embeddings(2)
    before = dalle(text, images, None, embeddings)[0]
    assert before.shape == (2, STREAM.text_length - 1, STREAM.text_vocab)
    for slot in range(1, STREAM.text_length):
        changed = text.clone()
        changed[:, slot] = 19
        after = dalle(changed, images, None, embeddings)[0]
        assert torch.equal(after[:, :slot], before[:, :slot])
        assert slot == STREAM.text_length - 1 or not torch.allclose(after[:, slot:], before[:, slot:])


@torch.no_grad()
def test_positions_of_text_and_picture_dont_depend_on_the_prefix() -> None:
    plain = DALLE(DALLEConfig(dim=16, layers=2, heads=2), dataclasses.replace(STREAM, image_prefix=0))
    with_prefix = _dalle()
    count = STREAM.text_length + N
    assert torch.equal(with_prefix.rope_cos[:count], plain.rope_cos)
    assert len(with_prefix.rope_cos) == count + 2
    assert len(torch.cat([with_prefix.rope_cos, with_prefix.rope_sin], dim=1).unique(dim=0)) == count + 2


def test_prefix_and_its_null_receive_gradient() -> None:
    dalle = _dalle()
    losses = dalle.loss(_captions(), _images(), embedding=_embeddings())
    losses.total(0.125, losses.num_text, losses.num_image).backward()
    dead = [name for name, p in dalle.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@torch.no_grad()
@pytest.mark.parametrize("slot_step", [None, 2])
def test_reading_never_sees_an_embedding_and_shares_the_pass(slot_step: int | None) -> None:
    stream = dataclasses.replace(STREAM, slot_step=slot_step)
    dalle, text, images, embeddings = _dalle(stream, reading_share=0.25), _captions(stream), _images(), _embeddings()
    reads = torch.tensor([True, False, True, False])
    together = dalle.loss(text, images, reads=reads, embedding=embeddings)
    drawn = dalle.loss(text[~reads], images[~reads], embedding=embeddings[~reads])
    read = dalle.caption_log_likelihood(text[reads], images[reads])
    for name in ("text_nll_sum", "num_text", "image_nll_sum", "num_image"):
        assert getattr(together, name).item() == pytest.approx(getattr(drawn, name).item(), rel=1e-5), name
    assert together.read_nll_sum.item() == pytest.approx(-read.sum().item(), rel=1e-5)


@pytest.mark.parametrize("settings", [GUIDED, UNGUIDED], ids=["guided", "unguided"])
@pytest.mark.parametrize("window", [1, 4])
def test_the_sampler_equals_the_slow_reference_with_embeddings(settings: SamplingConfig, window: int) -> None:
    bundle = tiny_bundle("dalle.image_prefix=3")
    assert bundle.dalle is not None
    dalle, prompts = bundle.dalle, ["a red circle", "two small yellow stars"]
    text = bundle.tokenizer.batch(prompts, bundle.stream.text_length)[0]
    rows = every_row(2, range(2))
    embeddings = F.normalize(torch.randn(4, bundle.recipe.clip.embed_dim), dim=1)
    drawn = sample_rows(
        dalle, text, prompts, rows, seed=3, settings=settings, embeddings=embeddings, window=window
    )  # fmt: skip
    keys = torch.tensor([noise_key(3, prompts[prompt]) for prompt, _ in rows])
    candidates = torch.tensor([candidate for _, candidate in rows])

    def pick(logits: Tensor, index: int) -> Tensor:
        noise = gumbel_noise(keys, candidates, torch.tensor([index]), bundle.stream.image_vocab)[:, 0]
        return choose(logits, settings, noise)

    scales = guidance_scales(settings, bundle.stream.num_image_tokens)
    captions = text[[prompt for prompt, _ in rows]]
    expected = dalle.generate(captions, pick, lambda index: scales[index], embedding=embeddings)
    assert torch.equal(drawn.ids, expected)
    plain = sample_rows(dalle, text, prompts, rows, seed=3, settings=settings)
    assert not torch.equal(drawn.ids, plain.ids), "the embeddings changed nothing"
    conditional = dalle.token_log_likelihoods(captions, expected, embeddings).sum(dim=1)
    null = dalle.log_likelihood(dalle.stream.null_captions(captions), expected)
    assert drawn.log_ratio is not None and drawn.log_likelihood is not None
    assert torch.allclose(drawn.log_likelihood, conditional, atol=1e-3)
    assert torch.allclose(drawn.log_ratio, conditional - null, atol=1e-3)
    assert not torch.allclose(log_likelihood_ratio(dalle, captions, expected), drawn.log_ratio, atol=1e-2)


@torch.no_grad()
def test_the_null_branch_ignores_the_embedding() -> None:
    dalle, text, images = _dalle(), _captions()[:1].expand(4, -1), _images()
    null = dalle(torch.full_like(text, NULL), images)[1]
    for embeddings in (_embeddings(), _embeddings().flip(0)):
        branches = Branches(Engine(dalle), text[:1], torch.zeros(4, dtype=torch.long), embeddings)
        branches.read(images[:, :2])
        first, likelihoods = branches.add_null(images[:, :3])
        assert torch.allclose(first[:, 0], null[:, 0], atol=1e-5)
        expected = null[:, :3].log_softmax(dim=-1).gather(2, images[:, :3, None])[..., 0]
        assert torch.allclose(likelihoods, expected, atol=1e-5)
        conditional, of_null = branches.read(images[:, 2:3])
        assert of_null is not None and torch.allclose(of_null[:, 0], null[:, 3], atol=1e-5)
        assert torch.allclose(conditional[:, 0], dalle(text, images, None, embeddings)[1][:, 3], atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_pictures_drawn_by_embeddings_dont_depend_on_the_batch_size(batch_size: int) -> None:
    bundle = tiny_bundle("dalle.image_prefix=3")
    assert bundle.dalle is not None
    text = bundle.tokenizer.batch(["a red circle"], bundle.stream.text_length)[0]
    embeddings = F.normalize(torch.randn(5, bundle.recipe.clip.embed_dim), dim=1)
    settings = SamplingConfig(guidance=2.0)
    rows = every_row(1, range(5))
    whole = sample_rows(bundle.dalle, text, ["x"], rows, seed=1, settings=settings, embeddings=embeddings)
    parts = sample_rows(
        bundle.dalle, text, ["x"], rows, seed=1, settings=settings, embeddings=embeddings, batch_size=batch_size
    )
    assert torch.equal(whole.ids, parts.ids)


def test_what_doesnt_fit_is_refused() -> None:
    plain = DALLE(DALLEConfig(dim=16, layers=2, heads=2), dataclasses.replace(STREAM, image_prefix=0)).eval()
    with pytest.raises(ValueError, match="knows no picture embeddings"):
        plain(_captions(), _images(), None, _embeddings())
    with pytest.raises(ValueError, match=r"embedding has shape \(4, 6\); expected \(4, 5\)"):
        _dalle()(_captions(), _images(), None, torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"image_prefix is 2, the stream's prefix 0"):
        DALLE(DALLEConfig(dim=16, heads=2, image_prefix=2), dataclasses.replace(STREAM, image_prefix=0))
    with pytest.raises(ValueError, match=r"embeddings have shape \(3, 5\); expected \(1, E\)"):
        sample_rows(_dalle(), _captions()[:1], ["x"], [(0, 0)], seed=0, settings=GUIDED, embeddings=torch.zeros(3, 5))


def unclip_task(*overrides: str) -> DALLETask:
    bundle = tiny_bundle("dalle.image_prefix=2", *overrides)
    assert bundle.dalle is not None and bundle.vae is not None
    views = len(bundle.recipe.data.views)
    vectors = np.random.default_rng(2).normal(size=(views, 30, bundle.recipe.clip.embed_dim)).astype(np.float16)
    cache = EmbeddingCache(vectors)
    return DALLETask(
        bundle.dalle, data(), bundle.recipe, bundle.tokenizer, token_cache(views), bundle.vae, cache
    )  # fmt: skip


def test_caption_and_embedding_are_dropped_at_their_rates_and_independently() -> None:
    task = unclip_task("dalle.caption_dropout=0.5", "dalle.embedding_dropout=0.2")
    captions, embeddings = [], []
    for step in range(150):
        batch = batch_of(task, step=step)
        captions.append(((batch["text"] == NULL) | (batch["text"] == PAD)).all(dim=1))
        embeddings.append((batch["embedding"] == 0).all(dim=1))
    no_caption, no_embedding = torch.cat(captions).float(), torch.cat(embeddings).float()
    captioned = 22 / 24
    assert no_caption.mean().item() == pytest.approx(1 - captioned / 2, abs=0.04)
    assert no_embedding.mean().item() == pytest.approx(0.2, abs=0.03)
    assert (no_caption * no_embedding).mean().item() == pytest.approx(0.2 * (1 - captioned / 2), abs=0.03)


@pytest.mark.parametrize("micro_batch_size", [1, 5])
def test_cutting_a_batch_with_embeddings_up_changes_nothing(micro_batch_size: int) -> None:
    task = unclip_task("dalle.reading_share=0.25")
    batch = batch_of(task)
    whole_metrics, whole = gradients(task, batch, None)
    cut_metrics, cut = gradients(task, batch, micro_batch_size)
    assert cut_metrics == pytest.approx(whole_metrics, rel=1e-4)
    for name, gradient in whole.items():
        assert torch.allclose(cut[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-7), name


def test_each_view_comes_with_its_own_embedding() -> None:
    task = unclip_task('data.views=["plain", "flip"]', "dalle.embedding_dropout=0")
    assert task.embeddings is not None
    order = BatchOrder(task.num_items, 12, seed=0)
    items = order.items(order.positions(0))
    batch = task.batch(items, order.positions(0))
    expected = task.embeddings.embeddings[batch["view"].numpy(), task.data.train[items]].astype(np.float32)
    assert torch.allclose(batch["embedding"], F.normalize(torch.from_numpy(expected), dim=1))
    assert set(batch["view"].tolist()) == {0, 1}


def test_cached_embeddings_are_clips_own_and_never_stale(tmp_path: Path) -> None:
    clip, other = tiny_bundle().clip, tiny_bundle(seed=1).clip
    assert clip is not None and other is not None
    pictures = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    fingerprint = embedding_fingerprint(clip, "data", ["plain", "flip"])
    cache = EmbeddingCache.build(tmp_path, clip, pictures, ["plain", "flip"], fingerprint, batch_size=4)
    images = images_from_pixels(torch.from_numpy(pictures))
    with torch.no_grad():
        expected = clip.encode_image(images), clip.encode_image(images.flip(-1))
    for view, vectors in enumerate(expected):
        assert torch.allclose(cache.vectors(np.arange(10), np.full(10, view)), vectors, atol=1e-3)
    assert EmbeddingCache.open(tmp_path, fingerprint) is not None
    assert EmbeddingCache.open(tmp_path, embedding_fingerprint(other, "data", ["plain", "flip"])) is None
    assert EmbeddingCache.open(tmp_path, embedding_fingerprint(clip, "other", ["plain", "flip"])) is None
