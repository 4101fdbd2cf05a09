"""Faults of the pipeline that are forbidden here: pictures that depend on company, options that do nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dalle_mini_impl import drawing
from dalle_mini_impl.drawn import rank
from dalle_mini_impl.engine import Engine
from dalle_mini_impl.pipeline import TextToImage
from dalle_mini_impl.pretrained import checkpoint_hash
from dalle_mini_impl.sampling import pack
from tests.tiny import TINY_CAPTIONS, tiny_bundle, tiny_checkpoint

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def model() -> TextToImage:
    return TextToImage(tiny_bundle())


def test_a_call_returns_the_best_first(model: TextToImage) -> None:
    everything = model(PROMPT, candidates=8, keep=8, seed=3)
    assert [picture.rank for picture in everything] == list(range(1, 9))
    assert {picture.candidate for picture in everything} == set(range(8))
    scores = [picture.score for picture in everything]
    assert scores == sorted(scores, reverse=True)
    kept = model(PROMPT, candidates=8, keep=3, seed=3)
    assert [picture.candidate for picture in kept] == [picture.candidate for picture in everything[:3]]
    best = kept[0]
    assert best.image.size == (16, 16) and best.prompt == PROMPT and best.seed == 3
    assert best.tokens.shape == (16,) and best.tokens.dtype == torch.long


def test_many_prompts_give_what_each_gives_alone(model: TextToImage) -> None:
    together = model.draw(TINY_CAPTIONS, candidates=3, keep=2, seed=1, batch_size=4)
    for prompt, pictures in zip(TINY_CAPTIONS, together, strict=True):
        alone = model(prompt, candidates=3, keep=2, seed=1)
        assert [picture.candidate for picture in pictures] == [picture.candidate for picture in alone]
        for ours, theirs in zip(pictures, alone, strict=True):
            assert torch.equal(ours.tokens, theirs.tokens)
            assert ours.clip_score == pytest.approx(theirs.clip_score, abs=1e-5)


def test_the_rank_goes_by_the_sum_of_all_scores_there_are() -> None:
    reader = tiny_bundle("dalle.reading_share=0.2")
    assert reader.clip is not None
    for bundle, ranked_by in [
        (tiny_bundle(), "clip_score + log_likelihood"),
        (dataclasses.replace(tiny_bundle(), clip=None), "log_likelihood"),
        (reader, "clip_score + read_score + log_likelihood"),
        (dataclasses.replace(reader, clip=None), "read_score + log_likelihood"),
    ]:
        model = TextToImage(bundle)
        assert model.ranked_by == ranked_by
        pictures = model(PROMPT, candidates=6, keep=6)
        for picture in pictures:
            assert (picture.clip_score is None) == (bundle.clip is None)
            assert (picture.read_score is None) == ("read_score" not in ranked_by)
            expected = 0.03 * picture.log_likelihood + (picture.read_score or 0.0)
            if bundle.clip is not None and picture.clip_score is not None:
                expected += bundle.clip.scale * picture.clip_score
            assert picture.score == pytest.approx(expected, abs=1e-4)
        assert [picture.score for picture in pictures] == sorted((p.score for p in pictures), reverse=True)


def test_the_transformer_is_packed_once_and_again_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []

    def count(*arguments: Any) -> Engine:
        packed.append(arguments)
        return pack(*arguments)

    monkeypatch.setattr(drawing, "pack", count)
    model = TextToImage(tiny_bundle())
    first = model(PROMPT, candidates=2, keep=1)[0]
    assert torch.equal(model(PROMPT, candidates=2, keep=1)[0].tokens, first.tokens) and len(packed) == 1
    with torch.no_grad():
        model.dalle.image_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    changed = model(PROMPT, candidates=2, keep=1)[0]
    assert len(packed) == 2
    assert torch.equal(TextToImage(model.bundle)(PROMPT, candidates=2, keep=1)[0].tokens, changed.tokens)
    list(model.stream(PROMPT, candidates=2))
    assert len(packed) == 3, "one for the other drawer, none for the stream"
    model(PROMPT, candidates=1, keep=1, temperature=0.5)
    assert len(packed) == 3, "how tokens are chosen is no matter of the weights"
    model.draw([PROMPT], settings=model.settings(kernel="torch", precision="fp32"))
    assert len(packed) == 4
    model.dalle.train()
    with pytest.raises(ValueError, match="in training mode"):
        model(PROMPT, candidates=1, keep=1)


def test_equal_scores_dont_depend_on_the_order(model: TextToImage) -> None:
    pictures = [dataclasses.replace(picture, score=0.5) for picture in model(PROMPT, candidates=5, keep=5)]
    assert [picture.candidate for picture in rank(pictures[::-1], 3)] == [0, 1, 2]


@pytest.mark.parametrize("change", [{"guidance": 1.0}, {"temperature": 0.3}, {"top_k": 1}, {"top_p": 0.2}], ids=str)
def test_every_sampler_option_does_something(model: TextToImage, change: dict[str, float]) -> None:
    plain = model(PROMPT, candidates=4, keep=4)
    changed = model(PROMPT, candidates=4, keep=4, **change)  # type: ignore[arg-type]
    tokens = [{picture.candidate: picture.tokens.tolist() for picture in pictures} for pictures in (plain, changed)]
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize("batch_size", [None, 2])
def test_what_is_watched_ends_as_what_is_called(model: TextToImage, batch_size: int | None) -> None:
    called = model(PROMPT, candidates=5, keep=3, seed=2)
    *previews, last = model.stream(PROMPT, candidates=5, keep=3, seed=2, batch_size=batch_size)
    assert last.ranked is not None and last.done == last.total == 5 * 16
    assert [picture.candidate for picture in last.ranked] == [picture.candidate for picture in called]
    for ours, theirs in zip(last.ranked, called, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens) and ours.score == pytest.approx(theirs.score, abs=1e-4)
    batches = 1 if batch_size is None else 3
    assert batches <= len(previews) <= 4 * batches  # a row of the grid each, or more where several tokens come at once
    done = [preview.done for preview in previews]
    assert done == sorted(set(done)) and all(preview.ranked is None for preview in previews)


def test_a_preview_is_grey_where_nothing_is_drawn_yet(model: TextToImage) -> None:
    first = next(model.stream(PROMPT, candidates=3))
    pixels = np.stack([np.asarray(image) for image in first.images])  # (3, 16, 16, 3)
    assert (pixels[:, 4:] == 200).all()
    assert (pixels[:, :4] != 200).any()


def test_bad_options_name_value_and_limit(model: TextToImage) -> None:
    with pytest.raises(ValueError, match=r"top_p is 1\.5: .*less than or equal to 1"):
        model(PROMPT, top_p=1.5)
    with pytest.raises(ValueError, match="keep is 9, but of 8 candidates 1 to 8"):
        model(PROMPT, candidates=8, keep=9)
    with pytest.raises(ValueError, match="candidates is 0"):
        model(PROMPT, candidates=0)


def test_a_checkpoint_without_its_models_is_refused() -> None:
    with pytest.raises(ValueError, match="'tiny' has no vae and dalle"):
        TextToImage(dataclasses.replace(tiny_bundle(), vae=None, dalle=None))


def test_from_pretrained_and_back(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    model = TextToImage.from_pretrained(folder)
    assert checkpoint_hash(model.save_pretrained(tmp_path / "again")) == checkpoint_hash(folder)
    seen: list[tuple[int, int]] = []
    model(PROMPT, candidates=2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (32, 32)
