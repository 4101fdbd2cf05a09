"""Faults of the transformer forbidden here: caches that change logits, futures that leak, dead null captions."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.config import DALLEConfig, NeighbourCell
from dalle_mini_impl.dalle import DALLE, DALLELosses
from dalle_mini_impl.stream import BOS, EOS, NULL, PAD, Stream
from tests.tiny import randomize

STREAM = Stream(text_length=6, grid_size=3, text_vocab=20, image_vocab=11)
N = STREAM.num_image_tokens
_values = {"dim": 16, "layers": 2, "heads": 2}


@pytest.fixture(params=[[], ["above"], get_args(NeighbourCell)], ids=["", "above", "five"], autouse=True)
def neighbours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds of models that are told what stands around a cell, too."""
    monkeypatch.setitem(_values, "neighbours", list(request.param))


def _dalle(num_views: int = 1, ffn: str = "relu2") -> DALLE:
    config = DALLEConfig.model_validate({**_values, "ffn": ffn})
    dalle = DALLE(config, STREAM, num_views)
    randomize(dalle)
    return dalle.eval()


def _captions() -> Tensor:
    """A padded, a full, a cut, an empty and the null caption, (5, 6)."""
    pieces: list[list[int]] = [[7, 9], [7, 8, 9, 10], [12, 13, 14, 15, 16, 17, 18], []]
    return torch.tensor([*(STREAM.fit_caption(ids)[0] for ids in pieces), STREAM.null_caption().tolist()])


def _images(batch: int = 5) -> Tensor:
    return torch.randint(0, STREAM.image_vocab, (batch, N))


def _likeliest(logits: Tensor, index: int) -> Tensor:
    return logits.argmax(dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("ffn", ["relu2", "swiglu"])
@pytest.mark.parametrize("num_views", [1, 3])
def test_cached_logits_equal_uncached_ones_at_every_position(num_views: int, ffn: str) -> None:
    dalle, text, images = _dalle(num_views, ffn), _captions(), _images()
    views = [None] if num_views == 1 else [None, torch.tensor([0, 1, 2, 1, 2])]
    for view in views:
        expected = dalle(text, images, view)[1]  # (B, N, Vi)
        logits, cache = dalle.prefill(text, view)
        assert torch.allclose(logits, expected[:, 0], atol=1e-5)
        for index in range(1, N):
            logits = dalle.decode_step(images[:, index - 1], index, cache, view)
            assert torch.allclose(logits, expected[:, index], atol=1e-5), index


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[N - 1], [1, 3, 2, 2], [4, 1, 3]])
def test_reading_several_tokens_at_once_equals_reading_them_one_by_one(chunks: list[int]) -> None:
    dalle, text, images = _dalle(), _captions(), _images()
    expected = dalle(text, images)[1]
    _, cache = dalle.prefill(text)
    start = 0
    for count in chunks:
        logits = dalle.extend(images[:, start : start + count], cache)
        assert torch.allclose(logits, expected[:, start + 1 : start + count + 1], atol=1e-5)
        start += count
    with pytest.raises(ValueError, match="the last to read is token 7"):
        dalle.extend(images[:, -1:], cache)


@torch.no_grad()
@pytest.mark.parametrize("taken_back", [1, 2, 4])
def test_tokens_taken_back_leave_no_trace(taken_back: int) -> None:
    dalle, text, images = _dalle(), _captions(), _images()
    expected = dalle(text, images)[1]
    _, cache = dalle.prefill(text)
    dalle.extend(images[:, :2], cache)
    wrong = images[:, 2:6].clone()
    wrong[:, 4 - taken_back :] = (wrong[:, 4 - taken_back :] + 1) % STREAM.image_vocab
    dalle.extend(wrong, cache)
    cache.take_back(taken_back)
    logits = dalle.extend(images[:, 6 - taken_back : 7], cache)
    assert torch.allclose(logits[:, -1], expected[:, 7], atol=1e-5)


@torch.no_grad()
def test_one_prefilled_caption_serves_many_candidates() -> None:
    dalle, text, images = _dalle(), _captions()[:2], _images(6)
    expected = dalle(text.repeat_interleave(3, dim=0), images)[1]
    _, cache = dalle.prefill(text)
    cache = cache.expand(3)
    for index in range(1, N):
        logits = dalle.decode_step(images[:, index - 1], index, cache)
        assert torch.allclose(logits, expected[:, index], atol=1e-5), index


@torch.no_grad()
def test_the_first_tokens_of_a_picture_give_the_first_logits() -> None:
    dalle, text, images = _dalle(), _captions(), _images()
    text_logits, image_logits = dalle(text, images)
    assert text_logits.shape == (5, 5, STREAM.text_vocab) and image_logits.shape == (5, N, STREAM.image_vocab)
    for n in range(N + 1):
        part = dalle(text, images[:, :n])
        assert part[1].shape[1] == min(n + 1, N)
        assert torch.allclose(part[0], text_logits, atol=1e-5)
        assert torch.allclose(part[1], image_logits[:, : n + 1], atol=1e-5)


@torch.no_grad()
def test_no_logit_sees_the_token_it_predicts_or_a_later_one() -> None:
    dalle, text, images = _dalle(), _captions()[:2], _images(2)
    text_logits, image_logits = dalle(text, images)
    for cell in range(N):
        changed = images.clone()
        changed[:, cell] = (changed[:, cell] + 1) % STREAM.image_vocab
        after_text, after_image = dalle(text, changed)
        assert torch.equal(after_text, text_logits)
        assert torch.equal(after_image[:, : cell + 1], image_logits[:, : cell + 1])
        if cell < N - 1:  # the last token is never read
            assert not torch.allclose(after_image[:, cell + 1 :], image_logits[:, cell + 1 :])
    for slot in range(1, STREAM.text_length):
        changed = text.clone()
        changed[:, slot] = 19
        after_text, after_image = dalle(changed, images)
        assert torch.equal(after_text[:, :slot], text_logits[:, :slot])
        assert not torch.allclose(after_image, image_logits)


@torch.no_grad()
def test_padding_is_a_learned_vector_of_its_slot_and_never_a_word() -> None:
    dalle, text, images = _dalle(), _captions(), _images()
    before = dalle(text, images)[1]
    dalle.text_embedding.weight[PAD] += torch.randn(16)
    assert torch.equal(dalle(text, images)[1], before)
    dalle.text_pad.weight[4] += torch.randn(16)
    changed = (dalle(text, images)[1] - before).abs().amax(dim=(1, 2)) > 1e-4
    assert changed.tolist() == [text_row[4] == PAD for text_row in text.tolist()] == [True, False, False, True, False]


def test_loss_sums_follow_their_definition_and_skip_padding_and_null_captions() -> None:
    dalle, text, images = _dalle(), _captions(), _images()
    losses = dalle.loss(text, images)
    text_logits, image_logits = dalle(text, images)
    text_sum, num_text, image_sum = 0.0, 0, 0.0
    for row in range(5):
        for slot in range(1, STREAM.text_length):
            target = int(text[row, slot])
            if target != PAD and row != 4:  # row 4 is the null caption
                text_sum -= text_logits[row, slot - 1].log_softmax(dim=0)[target].item()
                num_text += 1
        for cell in range(N):
            image_sum -= image_logits[row, cell].log_softmax(dim=0)[images[row, cell]].item()
    assert losses.text_nll_sum.item() == pytest.approx(text_sum, rel=1e-5)
    assert losses.image_nll_sum.item() == pytest.approx(image_sum, rel=1e-5)
    assert (int(losses.num_text), int(losses.num_image)) == (num_text, 5 * N) == (3 + 5 + 5 + 1, 45)
    total = losses.total(0.125, losses.num_text, losses.num_image).item()
    assert total == pytest.approx(0.125 * text_sum / num_text + 0.875 * image_sum / 45, rel=1e-5)


@pytest.mark.parametrize("cuts", [[1, 1, 1, 1, 1], [2, 3], [4, 1]])
def test_cutting_a_batch_changes_neither_sums_nor_gradients(cuts: list[int]) -> None:
    dalle, text, images = _dalle(), _captions(), _images()
    whole = dalle.loss(text, images)
    whole.total(0.125, whole.num_text, whole.num_image).backward()
    expected = {name: p.grad.clone() for name, p in dalle.named_parameters() if p.grad is not None}
    dalle.zero_grad()
    parts: list[DALLELosses] = []
    for rows, ids in zip(text.split(cuts), images.split(cuts), strict=True):
        parts.append(dalle.loss(rows, ids))
        parts[-1].total(0.125, whole.num_text, whole.num_image).backward()
    for name in ("text_nll_sum", "num_text", "image_nll_sum", "num_image"):
        total = sum(getattr(part, name).item() for part in parts)
        assert total == pytest.approx(getattr(whole, name).item(), rel=1e-5), name
    for name, parameter in dalle.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-6), name


def _looking_ahead() -> DALLE:
    dalle = DALLE(DALLEConfig.model_validate({**_values, "look_ahead": ["below", "right"]}), STREAM)
    dalle.learn_to_look_ahead()
    randomize(dalle)
    return dalle.train()


def test_cells_further_on_are_predicted_by_definition() -> None:
    dalle, text, images = _looking_ahead(), _captions(), _images()
    seen: list[Tensor] = []
    dalle.final_norm.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    losses = dalle.loss(text, images)
    look_ahead = dalle.look_ahead
    assert look_ahead is not None and losses.image_nll_sum > 0
    expected = 0.0
    for cell, offset in (("below", STREAM.grid_size), ("right", 1)):
        for row in range(5):
            own = 0.0
            for index in range(N - offset):
                output = seen[0][row, STREAM.text_length - 1 + index]  # it predicts cell `index`
                logits = dalle.image_head(look_ahead.norm(look_ahead.maps[cell](output)))
                own -= logits.log_softmax(dim=0)[images[row, index + offset]].item()
            expected += own * N / (N - offset)
    assert losses.ahead_nll_sum.item() == pytest.approx(expected, rel=1e-5)


def test_looking_ahead_trains_all_of_the_model_and_nothing_else_changes() -> None:
    dalle, text, images = _looking_ahead(), _captions(), _images()
    trained = dalle.loss(text, images)
    trained.ahead_nll_sum.backward()
    without = {name for name, p in dalle.named_parameters() if p.grad is None or not p.grad.any()}
    assert without <= {"text_head.weight"}
    evaluated = dalle.eval().loss(text, images)
    assert evaluated.ahead_nll_sum == 0 and trained.image_nll_sum.item() == evaluated.image_nll_sum.item()
    plain = _dalle()
    plain.load_state_dict({k: v for k, v in dalle.state_dict().items() if not k.startswith("look_ahead.")})
    assert plain.loss(text, images).image_nll_sum.item() == evaluated.image_nll_sum.item()
    plain.learn_to_look_ahead()
    assert plain.look_ahead is None


def test_a_batch_of_null_captions_has_no_text_loss_and_trains_the_null_caption() -> None:
    dalle, images = _dalle(), _images(2)
    losses = dalle.loss(STREAM.null_caption().expand(2, -1), images)
    assert (losses.text_nll_sum.item(), int(losses.num_text)) == (0.0, 0)
    losses.total(0.125, losses.num_text, losses.num_image).backward()
    gradient = dalle.text_embedding.weight.grad
    assert gradient is not None
    assert gradient[NULL].norm() > 0
    assert gradient[[BOS, EOS, 7]].norm() == 0
    assert dalle.text_head.weight.grad is not None and not dalle.text_head.weight.grad.any()


def test_corrupted_inputs_are_read_and_never_predicted() -> None:
    dalle, text, images = _dalle(), _captions(), _images()
    inputs = (images + 1) % STREAM.image_vocab
    logits = dalle(text, inputs)[1]
    expected = -logits.log_softmax(dim=-1).gather(2, images[:, :, None]).sum()
    assert dalle.loss(text, images, inputs=inputs).image_nll_sum.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_fresh_model_starts_at_the_entropy_of_the_vocabularies() -> None:
    dalle = DALLE(DALLEConfig(dim=16, layers=2, heads=2), STREAM)
    losses = dalle.loss(_captions(), _images())
    assert (losses.image_nll_sum / losses.num_image).item() == pytest.approx(torch.tensor(11.0).log().item())
    assert (losses.text_nll_sum / losses.num_text).item() == pytest.approx(torch.tensor(20.0).log().item())


def test_every_parameter_receives_gradient() -> None:
    dalle = _dalle(num_views=2)
    losses = dalle.loss(_captions(), _images(), torch.tensor([0, 1, 0, 1, 0]))
    losses.total(0.125, losses.num_text, losses.num_image).backward()
    dead = [name for name, p in dalle.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@torch.no_grad()
def test_views_change_pictures_and_the_plain_one_is_the_default() -> None:
    dalle, text, images = _dalle(num_views=2), _captions(), _images()
    plain = dalle(text, images)[1]
    assert torch.equal(dalle(text, images, torch.zeros(5, dtype=torch.long))[1], plain)
    assert not torch.allclose(dalle(text, images, torch.ones(5, dtype=torch.long))[1], plain)


@torch.no_grad()
@pytest.mark.parametrize("known", [1, 2])
def test_views_can_be_added_and_nothing_else_changes(known: int) -> None:
    dalle, text, images = _dalle(num_views=known), _captions(), _images()
    view = torch.tensor([0, 0, known - 1, known - 1, 0])
    before = dalle(text, images)[1], dalle(text, images, view)[1]
    dalle.add_views(4)
    assert dalle.num_views == 4
    for was, now in zip(before, (dalle(text, images)[1], dalle(text, images, view)[1]), strict=True):
        assert torch.equal(was, now)
    again = _dalle(num_views=4)
    again.load_state_dict(dalle.state_dict())
    assert torch.equal(again(text, images, view + 2)[1], dalle(text, images, view + 2)[1])
    dalle.add_views(4)
    with pytest.raises(ValueError, match="3 views are fewer than the 4"):
        dalle.add_views(3)


def test_a_view_that_was_never_learned_is_refused() -> None:
    dalle, text, images = _dalle(), _captions(), _images()
    view = torch.tensor([0, 1, 0, 0, 0])
    _, cache = dalle.prefill(text, torch.zeros_like(view))
    for ask in (
        lambda: dalle(text, images, view),
        lambda: dalle.prefill(text, view),
        lambda: dalle.decode_step(images[:, 0], 1, cache, view),
    ):
        with pytest.raises(ValueError, match="view 1 of a model that has only view 0"):
            ask()


def test_guidance_one_is_none_and_any_other_reaches_every_token() -> None:
    dalle, text = _dalle(), _captions()[:4]
    seen: dict[float | None, list[Tensor]] = {}
    fixed = _images(4)
    for scale in (None, 1.0, 3.0):
        logits_of: list[Tensor] = []

        def keep(logits: Tensor, index: int, logits_of: list[Tensor] = logits_of) -> Tensor:
            logits_of.append(logits)
            return fixed[:, index]  # the same picture for each scale

        dalle.generate(text, keep, None if scale is None else lambda index, scale=scale: scale)  # type: ignore[misc]
        seen[scale] = logits_of
    null = dalle(STREAM.null_caption().expand_as(text), fixed)[1]
    for index in range(N):
        assert torch.equal(seen[None][index], seen[1.0][index])
        guided = null[:, index] + 3 * (seen[None][index] - null[:, index])
        assert torch.allclose(seen[3.0][index], guided, atol=1e-4), index
        assert not torch.allclose(seen[3.0][index], seen[None][index], atol=1e-2), index


def test_generating_never_writes_to_its_inputs_nor_draws_random_numbers() -> None:
    dalle, text = _dalle(), _captions()
    before, state = text.clone(), torch.get_rng_state()
    weights = {name: value.clone() for name, value in dalle.state_dict().items()}
    ids = dalle.generate(text, _likeliest, lambda index: 2.0)
    _, cache = dalle.prefill(text)
    previous = ids[:, 0].clone()
    dalle.decode_step(previous, 1, cache)
    assert ids.shape == (5, N) and int(ids.min()) >= 0 and int(ids.max()) < STREAM.image_vocab
    assert torch.equal(text, before) and torch.equal(previous, ids[:, 0])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in dalle.state_dict().items())


def test_generate_takes_the_tokens_it_is_told() -> None:
    dalle, text, fixed = _dalle(), _captions(), _images()
    assert torch.equal(dalle.generate(text, lambda logits, index: fixed[:, index]), fixed)


def test_wrong_shapes_are_refused_by_name() -> None:
    dalle, text, images = _dalle(), _captions(), _images()
    with pytest.raises(ValueError, match=r"text_ids have shape \(5, 12\); expected \(B, t\) with t at most 6"):
        dalle(text.repeat(1, 2), images)
    with pytest.raises(ValueError, match=r"image_ids have shape \(5, 10\).* at most 9"):
        dalle(text, torch.zeros(5, 10, dtype=torch.long))
    with pytest.raises(ValueError, match=r"image_ids have shape \(5, 4\); expected \(5, 9\)"):
        dalle.loss(text, images[:, :4])
    with pytest.raises(ValueError, match=r"image_ids have shape \(2, 9\); expected \(5, 9\)"):
        dalle.loss(text, images[:2])
    with pytest.raises(ValueError, match=r"text_ids have shape \(6,\)"):
        dalle.prefill(text[0])


def test_tokens_out_of_turn_are_refused() -> None:
    dalle, text, images = _dalle(), _captions(), _images()
    _, cache = dalle.prefill(text)
    with pytest.raises(ValueError, match="image token 2 needs a cache of 7 tokens; this one has 6"):
        dalle.decode_step(images[:, 1], 2, cache)
    for index in range(1, N):
        dalle.decode_step(images[:, index - 1], index, cache)
    with pytest.raises(ValueError, match="image token 9 can't be decoded: pick 1 to 8"):
        dalle.decode_step(images[:, -1], N, cache)


def test_hidden_matrices_are_the_trunks_alone() -> None:
    dalle = _dalle()
    names = {id(p): name for name, p in dalle.named_parameters()}
    hidden = [names[id(p)] for p in dalle.hidden_matrices()]
    assert len(hidden) == 2 * 4
    assert all(name.startswith("blocks.") and name.endswith("weight") for name in hidden)


def _of_many_lengths() -> tuple[DALLE, torch.Tensor]:
    """A model whose captions take 4, 8 or 10 slots, and captions of each kind, mixed."""
    stream = dataclasses.replace(STREAM, text_length=10, slot_step=4)
    dalle = DALLE(DALLEConfig(dim=32, layers=2, heads=2), stream).eval()
    randomize(dalle)
    rows = [[BOS, *range(6, 4 + length), EOS] + [PAD] * (10 - length) for length in (10, 2, 7, 4, 9)]
    return dalle, torch.tensor(rows)


@torch.no_grad()
def test_loss_of_a_caption_does_not_depend_on_the_lengths_it_is_batched_with() -> None:
    dalle, text = _of_many_lengths()
    images = torch.randint(STREAM.image_vocab, (5, N), generator=torch.Generator().manual_seed(3))
    whole = dalle.loss(text, images)
    alone = [dalle.loss(text[row : row + 1], images[row : row + 1]) for row in range(5)]
    for name in ("text_nll_sum", "num_text", "image_nll_sum", "num_image"):
        together = torch.stack([getattr(part, name) for part in alone]).sum()
        assert torch.allclose(getattr(whole, name), together, atol=1e-3), name
    likelihoods = dalle.log_likelihood(text, images)
    assert torch.allclose(likelihoods, -torch.stack([part.image_nll_sum for part in alone]), atol=1e-3)


@torch.no_grad()
def test_cached_equals_uncached_for_captions_of_every_number_of_slots() -> None:
    dalle, text = _of_many_lengths()
    images = torch.randint(STREAM.image_vocab, (5, N), generator=torch.Generator().manual_seed(3))
    for rows, ids in dalle.stream.groups(text):
        logits = dalle(ids, images[rows])[1]
        first, cache = dalle.prefill(ids)
        cached = [first, *(dalle.decode_step(images[rows, i - 1], i, cache) for i in range(1, N))]
        assert torch.allclose(torch.stack(cached, dim=1), logits, atol=1e-5)


def _reader() -> DALLE:
    config = DALLEConfig.model_validate({"dim": 16, "layers": 2, "heads": 2, "reading_share": 0.25})
    dalle = DALLE(config, STREAM)
    randomize(dalle)
    return dalle.eval()


@torch.no_grad()
def test_a_caption_is_read_from_the_whole_picture_and_the_words_before() -> None:
    dalle, text, images = _reader(), _captions()[:2], _images(2)
    logits = dalle.read_logits(text, images)
    assert logits.shape == (2, STREAM.text_length - 1, STREAM.text_vocab)
    for cell in range(N):
        changed = images.clone()
        changed[:, cell] = (changed[:, cell] + 1) % STREAM.image_vocab
        assert not torch.allclose(dalle.read_logits(text, changed)[:, 0], logits[:, 0]), cell
    for slot in range(1, STREAM.text_length):
        changed = text.clone()
        changed[:, slot] = 19
        after = dalle.read_logits(changed, images)
        assert torch.equal(after[:, :slot], logits[:, :slot])
        assert slot == STREAM.text_length - 1 or not torch.allclose(after[:, slot:], logits[:, slot:])


@torch.no_grad()
def test_the_likelihood_of_a_caption_is_that_of_its_tokens() -> None:
    dalle, text, images = _reader(), _captions(), _images()
    logits = dalle.read_logits(text, images)
    expected = torch.zeros(5)
    for row in range(4):  # row 4 is the null caption: nothing is read
        for slot in range(1, STREAM.text_length):
            if text[row, slot] != PAD:
                expected[row] += logits[row, slot - 1].log_softmax(dim=0)[text[row, slot]]
    assert torch.allclose(dalle.caption_log_likelihood(text, images), expected, atol=1e-4)
    losses = dalle.loss(text, images, reads=torch.ones(5, dtype=torch.bool))
    assert losses.read_nll_sum.item() == pytest.approx(-expected.sum().item(), rel=1e-5)
    assert int(losses.num_read) == 3 + 5 + 5 + 1 and int(losses.num_image) == int(losses.num_text) == 0


@torch.no_grad()
@pytest.mark.parametrize("slot_step", [None, 2])
def test_drawing_and_reading_in_one_pass_are_what_they_are_alone(slot_step: int | None) -> None:
    stream = dataclasses.replace(STREAM, slot_step=slot_step)
    dalle = DALLE(DALLEConfig(dim=16, layers=2, heads=2, reading_share=0.25), stream)
    randomize(dalle)
    text, images, corrupted = _captions(), _images(), _images().flip(0)
    reads = torch.tensor([False, True, True, False, False])
    together = dalle.eval().loss(text, images, inputs=corrupted, reads=reads)
    drawn = dalle.loss(text[~reads], images[~reads], inputs=corrupted[~reads])
    read = dalle.caption_log_likelihood(text[reads], images[reads])
    for name in ("text_nll_sum", "num_text", "image_nll_sum", "num_image"):
        assert getattr(together, name).item() == pytest.approx(getattr(drawn, name).item(), rel=1e-5), name
    assert together.read_nll_sum.item() == pytest.approx(-read.sum().item(), rel=1e-5)
    assert int(together.num_read) == int((text[reads][:, 1:] != PAD).sum())


@torch.no_grad()
def test_captions_of_fewer_slots_are_read_as_likely_in_any_company() -> None:
    stream = dataclasses.replace(STREAM, slot_step=2)
    dalle = DALLE(DALLEConfig(dim=16, layers=2, heads=2, reading_share=0.25), stream)
    randomize(dalle)
    text, images = _captions(), _images()
    together = dalle.eval().caption_log_likelihood(text, images)
    for row in range(5):
        alone = dalle.caption_log_likelihood(text[row : row + 1], images[row : row + 1])
        assert torch.allclose(together[row : row + 1], alone, atol=1e-5)


def test_a_model_that_never_learned_to_read_says_so() -> None:
    with pytest.raises(ValueError, match="doesn't read captions"):
        _dalle().caption_log_likelihood(_captions(), _images())
