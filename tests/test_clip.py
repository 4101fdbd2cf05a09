"""Faults of CLIP forbidden here: equal captions as negatives, padding that is read, vectors off the unit sphere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_mini_impl.clip import CLIP, MAX_LOGIT_SCALE
from dalle_mini_impl.config import CLIPConfig
from dalle_mini_impl.stream import BOS, EOS, NULL, PAD
from tests.tiny import randomize

SIZE, LENGTH, VOCAB = 16, 6, 30


def _config(loss: str = "infonce") -> CLIPConfig:
    sizes: dict[str, Any] = {"embed_dim": 8, "stem_width": 8, "width": 16, "heads": 2}
    return CLIPConfig.model_validate(sizes | {"image_layers": 1, "text_layers": 2, "loss": loss})


def _clip(loss: str = "infonce", size: int = SIZE) -> CLIP:
    clip = CLIP(_config(loss), size, LENGTH, VOCAB)
    randomize(clip.image_tower)
    randomize(clip.text_tower)
    return clip.eval()


def _images(batch: int = 4, size: int = SIZE) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def _captions() -> Tensor:
    return torch.tensor(
        [
            [BOS, 7, 8, EOS, PAD, PAD],
            [BOS, 9, 10, 11, 12, EOS],
            [BOS, 7, 8, EOS, PAD, PAD],
            [NULL] * LENGTH,
        ]
    )


KEYS = torch.tensor([5, 3, 5, 0])  # the first caption stands there twice


def _unit(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def _slow_infonce(clip: CLIP, images: Tensor, texts: Tensor, image_keys: Tensor, text_keys: Tensor) -> float:
    """A row at a time: the mean over its positives of -log of their share of the softmax; both ways averaged."""
    scale = math.exp(min(clip.logit_scale.item(), MAX_LOGIT_SCALE))

    def one_way(queries: Tensor, keys: Tensor, query_ids: Tensor, key_ids: Tensor) -> float:
        rows: list[float] = []
        for query, query_id in zip(queries, query_ids, strict=True):
            logits = [scale * float(query @ key) for key in keys]
            total = math.log(sum(math.exp(logit) for logit in logits))
            positives = [logit for logit, key_id in zip(logits, key_ids, strict=True) if key_id == query_id]
            rows.append(sum(total - logit for logit in positives) / len(positives))
        return sum(rows) / len(rows)

    own = slice(len(images))  # texts beyond are hard negatives: they ask for no picture
    from_texts = one_way(texts[own], images, text_keys[own], image_keys)
    return 0.5 * (one_way(images, texts, image_keys, text_keys) + from_texts)


def _slow_siglip(clip: CLIP, images: Tensor, texts: Tensor, image_keys: Tensor, text_keys: Tensor) -> float:
    """Every pair is a question of its own: yes where the keys are equal."""
    assert clip.logit_bias is not None
    total = 0.0
    for image, image_key in zip(images, image_keys, strict=True):
        for text, text_key in zip(texts, text_keys, strict=True):
            logit = clip.logit_scale.exp().item() * float(image @ text) + clip.logit_bias.item()
            total += math.log1p(math.exp(-logit if image_key == text_key else logit))
    return total / len(images)


@pytest.mark.parametrize(("loss", "slow"), [("infonce", _slow_infonce), ("siglip", _slow_siglip)])
@pytest.mark.parametrize("keys", [[0, 1, 2, 3], [5, 3, 5, 0], [1, 1, 1, 1]], ids=str)
def test_losses_equal_loops_over_pairs(loss: str, slow: Any, keys: list[int]) -> None:
    clip, images, texts, ids = _clip(loss), _unit(4, 0), _unit(4, 1), torch.tensor(keys)
    assert clip.contrast(images, texts, ids, ids).item() == pytest.approx(slow(clip, images, texts, ids, ids), rel=1e-4)


@pytest.mark.parametrize(("loss", "slow"), [("infonce", _slow_infonce), ("siglip", _slow_siglip)])
def test_parts_of_a_batch_are_held_against_all_of_it(loss: str, slow: Any) -> None:
    clip, images, texts = _clip(loss), _unit(2, 0), _unit(5, 1)
    image_keys, text_keys = torch.tensor([4, 2]), torch.tensor([2, 4, 4, 2, 4])
    value = clip.contrast(images, texts, image_keys, text_keys).item()
    assert value == pytest.approx(slow(clip, images, texts, image_keys, text_keys), rel=1e-4)


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_equal_captions_are_not_negatives(loss: str) -> None:
    """The similarity of a picture and another picture's equal caption is raised, that of other pairs lowered."""
    clip = _clip(loss)
    similarity = torch.zeros(4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(clip.contrast(torch.eye(4), similarity.t(), KEYS, KEYS), similarity)
    assert torch.equal(gradient < 0, KEYS[:, None] == KEYS[None, :])
    assert bool((gradient != 0).all())


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_true_pairs_cost_less_than_swapped_ones(loss: str) -> None:
    clip, vectors, keys = _clip(loss), torch.eye(8)[:4], torch.arange(4)
    assert clip.contrast(vectors, vectors, keys, keys) < clip.contrast(vectors, vectors.roll(1, 0), keys, keys)


def test_a_fresh_infonce_starts_near_chance() -> None:
    clip = CLIP(_config().model_copy(update={"embed_dim": 256}), SIZE, LENGTH, VOCAB)
    captions = torch.randint(5, VOCAB, (32, LENGTH))
    loss, metrics = clip.loss(torch.rand(32, 3, SIZE, SIZE), captions, torch.arange(32))
    assert loss.item() == pytest.approx(math.log(32), abs=0.5)
    assert metrics["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-4)


@torch.no_grad()
def test_padding_is_never_seen() -> None:
    clip, captions = _clip(), _captions()
    before = clip.encode_text(captions)
    clip.text_tower.embedding.weight[PAD] += 100 * torch.randn(16)
    clip.text_tower.position[4:] += 100 * torch.randn(2, 16)
    after = clip.encode_text(captions)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.allclose(after[1], before[1])  # whose last two slots are words
    assert torch.equal(before[0], before[2])


@torch.no_grad()
def test_every_word_and_its_place_count() -> None:
    clip = _clip()
    captions = torch.tensor([[BOS, 7, 8, 9, EOS, PAD], [BOS, 8, 7, 9, EOS, PAD], [BOS, 7, 8, 10, EOS, PAD]])
    vectors = clip.encode_text(captions)
    assert (vectors @ vectors.t()).fill_diagonal_(0).max() < 0.999


@torch.no_grad()
@pytest.mark.parametrize("size", [8, 16, 20, 36, 64])
def test_vectors_are_unit_fp32_whatever_the_precision(size: int) -> None:
    clip = _clip(size=size)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for vectors in (clip.encode_image(_images(size=size)), clip.encode_text(_captions())):
                assert (vectors.shape, vectors.dtype) == ((4, 8), torch.float32)
                assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-5)


@torch.no_grad()
def test_a_vector_doesnt_depend_on_its_neighbours_in_the_batch() -> None:
    clip, images, captions = _clip(), _images(), _captions()
    for encode, inputs in ((clip.encode_image, images), (clip.encode_text, captions)):
        alone = torch.cat([encode(row[None]) for row in inputs])
        assert torch.allclose(alone, encode(inputs), atol=1e-5)
    assert (clip.encode_image(images)[0] - clip.encode_image(images)[1]).abs().max() > 1e-3


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_every_parameter_learns_and_pairs_are_found(loss: str) -> None:
    clip = CLIP(_config(loss), SIZE, LENGTH, VOCAB).train()
    colours = torch.eye(4)[[3, 1, 3, 2], :3]  # black, green, black, blue
    images, captions = colours[:, :, None, None].expand(-1, -1, SIZE, SIZE), _captions()
    optimizer = torch.optim.Adam(clip.parameters(), 3e-3)
    touched: set[str] = set()
    for _ in range(120):
        value, metrics = clip.loss(images, captions, KEYS)
        optimizer.zero_grad()
        value.backward()
        touched |= {name for name, p in clip.named_parameters() if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
    assert touched == {name for name, _ in clip.named_parameters()}
    assert metrics["batch_recall"].item() == 1.0
    assert not metrics["batch_recall"].requires_grad


def test_a_runaway_logit_scale_is_held_at_a_hundred() -> None:
    clip, vectors, keys = _clip(), _unit(4, 0), torch.arange(4)
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(100))
    at_limit = clip.contrast(vectors, vectors, keys, keys).item()
    with torch.no_grad():
        clip.logit_scale.fill_(50.0)
    assert clip.contrast(vectors, vectors, keys, keys).item() == pytest.approx(at_limit)


def test_the_contrast_is_fp32_inside_of_an_autocast() -> None:
    """At a scale of 100, bf16 tells logits apart by half a nat."""
    clip, images, texts, keys = _clip(), _unit(6, 0), _unit(6, 1), torch.arange(6)
    with torch.no_grad():
        clip.logit_scale.fill_(MAX_LOGIT_SCALE)
    expected = clip.contrast(images, texts, keys, keys)
    with torch.autocast("cpu", torch.bfloat16):
        found = clip.contrast(images, texts, keys, keys)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_scalars_have_a_dimension_and_only_siglip_has_a_bias() -> None:
    assert _clip().logit_scale.shape == (1,) and _clip().logit_bias is None
    bias = _clip("siglip").logit_bias
    assert bias is not None and bias.shape == (1,)


def test_wrong_shapes_are_refused_by_name() -> None:
    clip = _clip()
    with pytest.raises(ValueError, match=r"images have shape \(4, 3, 8, 8\); expected \(B, 3, 16, 16\)"):
        clip.encode_image(_images(size=8))
    with pytest.raises(ValueError, match=r"images have shape \(3, 16, 16\)"):
        clip.encode_image(_images()[0])
    with pytest.raises(ValueError, match=r"text_ids have shape \(4, 7\); expected \(B, 6\), or fewer slots"):
        clip.encode_text(F.pad(_captions(), (0, 1)))
    with pytest.raises(ValueError, match=r"keys have shape \(3,\); expected \(4,\)"):
        clip.loss(_images(), _captions(), KEYS[:3])
    with pytest.raises(ValueError, match="2 pictures and 4 captions"):
        clip.loss(_images(2), _captions(), KEYS)


@pytest.mark.parametrize(("loss", "slow"), [("infonce", _slow_infonce), ("siglip", _slow_siglip)])
def test_hard_negatives_are_compared_with_pictures_and_ask_for_none(loss: str, slow: Any) -> None:
    clip, images, texts = _clip(loss), _unit(4, 1), _unit(7, 2)
    text_keys = torch.cat([KEYS, torch.tensor([91, 3, 92])])  # one of them is in truth a caption of the second picture
    value = clip.contrast(images, texts, KEYS, text_keys).item()
    assert value == pytest.approx(slow(clip, images, texts, KEYS, text_keys), rel=1e-4)
    assert value > clip.contrast(images, texts[:4], KEYS, KEYS).item() - (1.0 if loss == "infonce" else 0.0)
    whole, _ = clip.loss(_images(), _captions(), KEYS, _captions()[[1, 3]], torch.tensor([91, 92]))
    assert whole.item() != clip.loss(_images(), _captions(), KEYS)[0].item()


def _reader() -> CLIP:
    clip = CLIP(_config().model_copy(update={"caption_layers": 2}), SIZE, LENGTH, VOCAB)
    randomize(clip)
    return clip.eval()


def test_a_caption_is_read_word_by_word() -> None:
    """Each word's probability, by a model that is shown no more than the words before it."""
    clip, images, texts = _reader(), _images(), _captions()[[1, 0, 1, 2]]
    assert clip.captioner is not None
    with torch.no_grad():
        found = clip.caption_log_likelihood(images, texts)
        for row in range(4):
            expected, places = 0.0, clip.places(images[row : row + 1])
            for slot in range(1, int((texts[row] != PAD).sum())):
                logits = clip.captioner(places, texts[row : row + 1, :slot])[0, -1]
                expected += logits.log_softmax(dim=0)[texts[row, slot]].item()
            assert found[row].item() == pytest.approx(expected, rel=1e-4)


def test_reading_depends_on_the_picture_and_on_no_padding() -> None:
    clip, images, texts = _reader(), _images(2), _captions()[:1].expand(2, -1)
    with torch.no_grad():
        found = clip.caption_log_likelihood(images, texts)
        assert found[0] != pytest.approx(found[1].item(), abs=1e-3)
        assert torch.allclose(clip.caption_log_likelihood(images, texts[:, :4]), found, atol=1e-5)
        assert torch.allclose(clip.encode_text(texts[:, :4]), clip.encode_text(texts), atol=1e-6)


def test_pairs_are_scored_as_each_score_by_itself() -> None:
    clip, images, texts = _reader(), _images(4), _captions()[[1, 0, 1, 2]]
    with torch.no_grad():
        cosines, likelihoods = clip.score_pairs(images, texts)
        expected = (clip.encode_image(images) * clip.encode_text(texts)).sum(dim=1)
        assert torch.allclose(cosines, expected, atol=1e-6) and expected.std() > 1e-3
        assert torch.allclose(likelihoods, clip.caption_log_likelihood(images, texts), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_written_captions_have_the_likelihood_that_reading_gives_them(temperature: float) -> None:
    clip, images = _reader(), _images(16)
    with torch.no_grad():
        places = clip.places(images)
        texts, likelihoods = clip.write_captions(places, temperature, seed=3)
        assert torch.allclose(clip.caption_log_likelihood(images, texts), likelihoods, rtol=1e-4, atol=1e-4)
        assert torch.equal(clip.write_captions(places[:5], temperature, seed=3)[0], texts[:5]), "as in any other batch"
        assert torch.equal(clip.write_captions(places, temperature, seed=4)[0], texts) == (temperature == 0)
    assert texts.shape == (16, LENGTH) and bool((texts[:, 0] == BOS).all())
    for row in texts.tolist():
        end = row.index(EOS)
        assert end > 1 and set(row[end + 1 :]) <= {PAD} and not {PAD, BOS, EOS, NULL} & set(row[1:end])


def test_a_captioner_adds_its_nats_to_the_loss() -> None:
    clip, images, texts = _reader(), _images(), _captions()[[1, 0, 1, 2]]
    keys = torch.tensor([3, 5, 3, 5])
    loss, metrics = clip.loss(images, texts, keys)
    nats = -clip.caption_log_likelihood(images, texts).sum() / (texts[:, 1:] != PAD).sum()
    assert metrics["caption_nll"].item() == pytest.approx(nats.item(), rel=1e-5)
    contrast = clip.contrast(*clip(images, texts), keys, keys)
    assert metrics["contrast"].item() == pytest.approx(contrast.item(), rel=1e-5)
    assert loss.item() == pytest.approx(contrast.item() + 2 * nats.item(), rel=1e-5)


def test_a_clip_without_a_captioner_says_so() -> None:
    with pytest.raises(ValueError, match=r"has no captioner: train it with clip\.caption_layers above 0"):
        _clip().caption_log_likelihood(_images(), _captions())
