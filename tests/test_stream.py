"""The token stream: its offsets, its positions and what it refuses."""

from __future__ import annotations

import pytest
import torch

from dalle_mini_impl.stream import BOS, EOS, NULL, NUM_SPECIAL, PAD, UNK, Stream


def _stream(text_length: int = 8, grid_size: int = 3) -> Stream:
    return Stream(text_length=text_length, grid_size=grid_size, text_vocab=300, image_vocab=16)


def test_special_ids_are_distinct_and_fixed() -> None:
    assert tuple(range(NUM_SPECIAL)) == (PAD, BOS, EOS, UNK, NULL)  # stored in every checkpoint: they may not change


def test_the_last_image_id_is_never_read() -> None:
    stream = _stream()
    assert stream.num_image_tokens == 9
    assert stream.num_inputs == 8 + 9 - 1


def _captions(*lengths: int) -> torch.Tensor:
    return torch.tensor([[BOS] + [9] * (length - 2) + [EOS] + [PAD] * (20 - length) for length in lengths])


def test_slots_of_a_caption_do_not_depend_on_its_batch() -> None:
    stream = Stream(text_length=20, grid_size=3, text_vocab=300, image_vocab=16, slot_step=8)
    captions = _captions(20, 2, 8, 9, 16, 17)
    assert stream.num_slots(captions).tolist() == [20, 8, 8, 16, 16, 20]
    assert [stream.num_slots(caption[None]).item() for caption in captions] == [20, 8, 8, 16, 16, 20]
    assert Stream(text_length=20, grid_size=3, text_vocab=300, image_vocab=16).num_slots(captions).unique() == 20


def test_groups_hold_every_caption_once_and_cut_off_padding_only() -> None:
    stream = Stream(text_length=20, grid_size=3, text_vocab=300, image_vocab=16, slot_step=8)
    captions = _captions(20, 2, 8, 9, 16, 17)
    groups = stream.groups(captions)
    assert [ids.shape[1] for _, ids in groups] == [8, 16, 20]
    assert sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(6))
    for rows, ids in groups:
        assert torch.equal(captions[rows, : ids.shape[1]], ids)
        assert (captions[rows, ids.shape[1] :] == PAD).all()


def test_null_captions_take_the_slots_of_the_captions_they_stand_for() -> None:
    stream = Stream(text_length=20, grid_size=3, text_vocab=300, image_vocab=16, slot_step=8)
    captions = _captions(20, 2, 9)
    null = stream.null_captions(captions)
    assert (null == NULL).sum(dim=1).tolist() == [20, 8, 16]
    assert torch.equal(stream.num_slots(null), stream.num_slots(captions))


def test_image_positions_are_row_major_and_ignore_the_caption() -> None:
    positions = _stream().image_positions()
    assert positions.tolist() == [[row, column] for row in range(3) for column in range(3)]
    assert torch.equal(positions, _stream(text_length=64).image_positions())
    assert _stream().text_positions().tolist() == list(range(8))


def test_null_caption_is_no_real_caption() -> None:
    null = _stream().null_caption()
    assert (null.shape, null.dtype) == ((8,), torch.int64)
    assert null.unique().tolist() == [NULL]
    assert NULL not in _stream().fit_caption([])[0]


@pytest.mark.parametrize(
    ("num_pieces", "cut"), [(0, False), (1, False), (6, False), (7, True), (1000, True)], ids=lambda value: str(value)
)
def test_captions_keep_their_end_when_cut(num_pieces: int, cut: bool) -> None:
    pieces = list(range(10, 10 + num_pieces))
    ids, was_cut = _stream().fit_caption(pieces)
    kept = pieces[:6]
    assert was_cut is cut
    assert ids == [BOS, *kept, EOS] + [PAD] * (6 - len(kept))
    assert pieces == list(range(10, 10 + num_pieces))


@pytest.mark.parametrize(
    "wrong",
    [{"text_length": 1}, {"grid_size": 0}, {"text_vocab": NUM_SPECIAL}, {"image_vocab": 1}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_impossible_streams_are_refused(wrong: dict[str, int]) -> None:
    sizes = {"text_length": 8, "grid_size": 3, "text_vocab": 300, "image_vocab": 16}
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        Stream(**(sizes | wrong))


def test_wrong_shapes_are_refused_with_their_shape() -> None:
    stream = _stream()
    stream.check_text(torch.zeros(2, 8, dtype=torch.long))
    stream.check_image(torch.zeros(2, 0, dtype=torch.long))
    stream.check_image(torch.zeros(2, 9, dtype=torch.long))
    stream.check_text(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(2, 9\); expected \(B, t\) with t at most 8"):
        stream.check_text(torch.zeros(2, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(2, 10\); expected \(B, n\) with n at most 9"):
        stream.check_image(torch.zeros(2, 10, dtype=torch.long))
