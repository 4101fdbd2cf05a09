"""Faults forbidden here: features that change what is drawn, stay in a checkpoint, or teach like codes nothing."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from dalle_mini_impl.config import DALLEConfig, NeighbourCell, SamplingConfig
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.layers.code_features import features_of
from dalle_mini_impl.pretrained import build_vae
from dalle_mini_impl.sampling import pack
from dalle_mini_impl.stream import Stream
from tests.tiny import randomize, tiny_recipe

STREAM = Stream(text_length=6, grid_size=3, text_vocab=20, image_vocab=11)
N = STREAM.num_image_tokens


def _config(**settings: object) -> DALLEConfig:
    values = {"dim": 16, "layers": 2, "heads": 1, "neighbours": ["above", "two_left"], "code_features": True}
    return DALLEConfig.model_validate({**values, **settings})


def _vectors(seed: int = 0) -> Tensor:
    """Of 11 codes, the first two of which are alike."""
    vectors = torch.randn(STREAM.image_vocab, 5, generator=torch.Generator().manual_seed(seed))
    vectors[1] = vectors[0]
    return vectors


def _learning(**settings: object) -> DALLE:
    """One whose maps say something."""
    dalle = DALLE(_config(**settings), STREAM)
    dalle.learn_by_features(_vectors())
    randomize(dalle)
    return dalle


def _batch(batch: int = 4) -> tuple[Tensor, Tensor]:
    text = torch.tensor([STREAM.fit_caption([7, 8 + row])[0] for row in range(batch)])
    return text, torch.randint(0, STREAM.image_vocab, (batch, N), generator=torch.Generator().manual_seed(1))


def test_features_have_one_size_whatever_the_vectors() -> None:
    for vectors in (_vectors(), 100 * _vectors() + 3, torch.randn(64, 40).half()):
        features = features_of(vectors)
        assert features.dtype == torch.float32
        assert torch.allclose(features.mean(dim=0), torch.zeros(features.shape[1]), atol=1e-4)
        assert features.square().sum(dim=1).mean().item() == pytest.approx(8, rel=1e-3)
    assert not features_of(torch.ones(5, 3)).any()


@pytest.mark.parametrize("quantizer", ["vq", "fsq", "gumbel"])
def test_vectors_are_what_the_decoder_is_given(quantizer: str) -> None:
    vae = build_vae(tiny_recipe(f"vae.quantizer={quantizer}")).eval()
    vectors = vae.code_vectors()
    grid = vae.grid_size
    ids = torch.arange(grid * grid)[None] % vae.num_codes
    given = vae.quantizer.vectors(ids, grid)  # (1, C, grid, grid)
    assert torch.equal(vectors[ids[0]], given.flatten(2)[0].t())
    assert not vectors.requires_grad


def test_maps_are_of_zeros_at_first() -> None:
    dalle = DALLE(_config(), STREAM)
    randomize(dalle)
    before = [logits.detach() for logits in dalle(*_batch())]
    dalle.learn_by_features(_vectors())
    assert all(torch.equal(own, theirs) for own, theirs in zip(dalle(*_batch()), before, strict=True))


@pytest.mark.parametrize("cells", [(), ("above",), get_args(NeighbourCell)], ids=len)
def test_each_table_is_its_rows_and_a_map_of_the_features(cells: tuple[NeighbourCell, ...]) -> None:
    dalle = _learning(neighbours=list(cells))
    features = features_of(_vectors())
    state = dalle.state_dict()

    def parts(name: str) -> tuple[Tensor, Tensor]:
        prefix = f"{name}.parametrizations.weight"
        return state[f"{prefix}.original"], state[f"{prefix}.0.map"]

    for name in ("image_embedding", "image_head"):
        rows, linear = parts(name)
        assert torch.allclose(dalle.get_submodule(name).weight, rows + features @ linear.t(), atol=1e-6), name
    if not cells:
        assert dalle.neighbours is None
        return
    assert dalle.neighbours is not None
    rows, linear = parts("neighbours.table")
    weight = dalle.neighbours.table.weight
    for number in range(len(cells)):
        own = slice(number * 12, number * 12 + 11)
        told = features @ linear[number * 16 : (number + 1) * 16].t()
        assert torch.allclose(weight[own], rows[own] + told, atol=1e-6)
        assert torch.equal(weight[number * 12 + 11], rows[number * 12 + 11]), "no code has no features"


def test_what_is_learned_of_a_code_is_learned_of_codes_like_it() -> None:
    """Pictures of code 0 alone make code 1, which looks the same, likelier by as much as their maps' share."""
    text, _ = _batch()
    seen, like = torch.zeros(4, N, dtype=torch.long), torch.ones(4, N, dtype=torch.long)
    gains = {}
    for has_features in (False, True):
        dalle = DALLE(_config(code_features=has_features), STREAM)
        dalle.learn_by_features(_vectors())
        randomize(dalle)
        optimizer = torch.optim.AdamW(dalle.parameters(), lr=0.01, weight_decay=0)
        before = dalle.token_log_likelihoods(text, like).mean().item()
        for _ in range(5):
            optimizer.zero_grad()
            dalle.loss(text, seen).image_nll_sum.backward()
            optimizer.step()
        gains[has_features] = dalle.token_log_likelihoods(text, like).mean().item() - before
    assert gains[True] > gains[False] + 0.1


@torch.no_grad()
def test_a_finished_model_has_none_and_draws_the_same() -> None:
    dalle = _learning(look_ahead=["below"]).eval()
    dalle.learn_to_look_ahead()
    text, images = _batch()
    expected, drawn = dalle(text, images)[1], dalle.generate(text, lambda logits, _: logits.argmax(dim=-1))
    for settings in (SamplingConfig(precision="fp32"), SamplingConfig(precision="fp32", kernel="torch")):
        logits, _ = pack(dalle, settings).prefill(text)
        assert torch.allclose(logits, expected[:, 0], atol=1e-4), "samples in training are drawn by the sums"
    dalle.end_training()
    plain = DALLE(_config(), STREAM).eval()
    plain.load_state_dict(dalle.state_dict())
    assert not parametrize.is_parametrized(dalle) and dalle.look_ahead is None
    for finished in (dalle, plain):
        assert torch.allclose(finished(text, images)[1], expected, atol=1e-5)
        assert torch.equal(finished.generate(text, lambda logits, _: logits.argmax(dim=-1)), drawn)
    dalle.end_training()  # a model that has none


def test_it_is_asked_for_and_of_all_codes() -> None:
    plain = DALLE(_config(code_features=False), STREAM)
    plain.learn_by_features(_vectors())
    assert not parametrize.is_parametrized(plain)
    with pytest.raises(ValueError, match="vectors of 10 codes for a DALLE of 11: give each one"):
        DALLE(_config(), STREAM).learn_by_features(_vectors()[:10])
