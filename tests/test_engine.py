"""The packed transformer gives the logits of the readable one."""

from __future__ import annotations

import pytest
import torch

from dalle_mini_impl.config import DALLEConfig
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.engine import Engine
from dalle_mini_impl.stream import Stream
from tests.tiny import randomize, some_captions

STREAM = Stream(text_length=6, grid_size=3, text_vocab=20, image_vocab=11)
N = STREAM.num_image_tokens


def _dalle(num_views: int = 1, **values: object) -> DALLE:
    config = DALLEConfig.model_validate({"dim": 16, "layers": 2, "heads": 2, **values})
    dalle = DALLE(config, STREAM, num_views)
    randomize(dalle)
    return dalle.eval()


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * (N - 1), [N - 1], [2, 1, 4, 1]], ids=str)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"ffn": "swiglu"},
        {"token_shift": False},
        {"heads": 4},
        {"neighbours": ["above", "two_above"]},
    ],
    ids=str,
)
def test_packed_logits_equal_those_of_the_whole_stream(values: dict[str, object], chunks: list[int]) -> None:
    for num_views in (1, 2):
        dalle, text, images = _dalle(num_views, **values), some_captions(STREAM), torch.randint(0, 11, (4, N))
        expected = dalle(text, images)[1]
        logits, cache = Engine(dalle).prefill(text)
        assert torch.allclose(logits, expected[:, 0], atol=1e-5)
        start, engine = 0, Engine(dalle)
        for count in chunks:
            logits = engine.extend(images[:, start : start + count], cache)
            assert torch.allclose(logits, expected[:, start + 1 : start + 1 + count], atol=1e-5)
            start += count


@torch.no_grad()
def test_short_captions_stand_where_the_stream_puts_them() -> None:
    dalle, images = _dalle(), torch.randint(0, 11, (2, N))
    text = torch.tensor([[1, 7, 9, 2], [1, 8, 2, 0]])  # four of six slots
    expected = dalle(text, images)[1]
    engine = Engine(dalle)
    _, cache = engine.prefill(text)
    assert torch.allclose(engine.extend(images[:, :-1], cache), expected[:, 1:], atol=1e-5)


@torch.no_grad()
def test_bf16_stays_near_and_in_its_own_type() -> None:
    dalle, text, images = _dalle(), some_captions(STREAM), torch.randint(0, 11, (4, N))
    expected = dalle(text, images)[1]
    engine = Engine(dalle, torch.bfloat16)
    logits, cache = engine.prefill(text)
    assert {cache.keys.dtype, cache.values.dtype, cache.last.dtype} == {torch.bfloat16}
    assert logits.dtype == torch.float32
    logits = engine.extend(images[:, :-1], cache)
    assert (logits - expected[:, 1:]).abs().mean() < 0.03 * expected.abs().mean()


@torch.no_grad()
def test_packing_copies_the_weights() -> None:
    dalle, text = _dalle(), some_captions(STREAM)
    engine = Engine(dalle)
    before = engine.prefill(text)[0]
    for block in dalle.blocks:
        block.attention.qkv.weight.zero_()
    dalle.image_head.weight.zero_()
    assert torch.equal(engine.prefill(text)[0], before)


@torch.no_grad()
def test_an_outer_autocast_changes_nothing() -> None:
    dalle, text = _dalle(), some_captions(STREAM)
    engine = Engine(dalle)
    with torch.autocast("cpu", torch.bfloat16):
        inside = engine.prefill(text)[0]
    assert torch.equal(inside, engine.prefill(text)[0])
