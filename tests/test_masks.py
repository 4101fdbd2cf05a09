"""DALL·E 1's attention patterns are those of the paper, and every way of decoding honours them."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dalle_mini_impl.config import AttentionPattern, DALLEConfig, Recipe, SamplingConfig
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.engine import Engine
from dalle_mini_impl.filters import choose, guidance_scales
from dalle_mini_impl.layers.attention import KVCache, attend
from dalle_mini_impl.layers.bag_attention import CHUNK, BagCache
from dalle_mini_impl.layers.masks import column_mask, conv_mask, full_mask, row_mask, stream_mask
from dalle_mini_impl.noise import gumbel_noise, noise_key
from dalle_mini_impl.sampling import stream_tokens
from dalle_mini_impl.stream import NULL, Stream
from tests.tiny import randomize, some_captions

STREAM = Stream(text_length=6, grid_size=4, text_vocab=20, image_vocab=11)
N = STREAM.num_image_tokens
PATTERNS: list[AttentionPattern] = ["full", "row", "column", "conv"]
MODELS: list[dict[str, Any]] = [
    {"attention": ["row", "row", "row", "row"]},
    {"attention": ["column", "column", "column", "column"]},
    {"attention": ["conv", "conv", "conv", "conv"]},
    {"attention": "dalle1"},
    {"attention": "dalle1", "positions": "learned", "token_shift": False, "ffn": "gelu"},
    {"attention": ["full", "conv", "full", "row"], "positions": "learned"},
    {"positions": "learned"},
]


# --- the patterns ---


def _mask(size: int, may_see: Any) -> Tensor:
    """Of a rule about (row, column) of a query and (row, column) of a key, one pair at a time."""
    cells = list(product(range(size), repeat=2))
    return torch.tensor([[may_see(*query, *key) for key in cells] for query in cells])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_a_row_reaches_back_to_the_cell_above(size: int) -> None:
    def may_see(row: int, column: int, key_row: int, key_column: int) -> bool:
        in_own_row = key_row == row and key_column <= column
        in_row_above = key_row == row - 1 and key_column >= column
        return in_own_row or in_row_above

    assert torch.equal(row_mask(size), _mask(size, may_see))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_a_column_is_what_stands_above(size: int) -> None:
    def may_see(row: int, column: int, key_row: int, key_column: int) -> bool:
        return key_column == column and key_row <= row

    assert torch.equal(column_mask(size), _mask(size, may_see))


@pytest.mark.parametrize(("size", "kernel"), [(1, 3), (3, 1), (4, 3), (5, 5), (8, 3), (9, 5), (4, 11), (16, 11)])
def test_conv_is_the_earlier_half_of_a_neighbourhood_that_wraps_around(size: int, kernel: int) -> None:
    seen = torch.zeros(size * size, size * size, dtype=torch.bool)
    reach = kernel // 2
    for row, column in product(range(size), repeat=2):
        for up in range(reach + 1):
            for left in range(-reach, reach + 1):
                if up == 0 and left < 0:
                    continue  # later in the own row
                key_row, key_column = row - up, column - left
                while key_column < 0:
                    key_row, key_column = key_row - 1, key_column + size
                while key_column >= size:
                    key_row, key_column = key_row + 1, key_column - size
                if key_row >= 0 and (key_row, key_column) <= (row, column):
                    seen[row * size + column, key_row * size + key_column] = True
    assert torch.equal(conv_mask(size, kernel), seen)


def test_away_from_the_borders_conv_is_a_plain_causal_neighbourhood() -> None:
    mask = conv_mask(9, 5).view(9, 9, 9, 9)[4, 4]  # what the cell in the middle sees
    rows = ["".join("x" if cell else "." for cell in row) for row in mask[1:6].tolist()]
    assert rows == [".........", "..xxxxx..", "..xxxxx..", "..xxx....", "........."]


def test_no_cell_is_blind_and_none_sees_a_later_one() -> None:
    for mask in (full_mask(5), row_mask(5), column_mask(5), conv_mask(5, 3)):
        assert mask.diagonal().all() and not mask.triu(1).any()
    assert torch.equal(full_mask(5), torch.ones(25, 25, dtype=torch.bool).tril())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_caption_is_causal_never_sees_the_picture_and_is_seen_by_all_of_it(pattern: AttentionPattern) -> None:
    mask = stream_mask(STREAM, pattern, 3)
    text, total = STREAM.text_length, STREAM.num_inputs
    assert mask.shape == (total, total)
    assert torch.equal(mask[:text, :text], torch.ones(text, text, dtype=torch.bool).tril())
    assert not mask[:text, text:].any() and mask[text:, :text].all()
    cells = {"full": full_mask(4), "row": row_mask(4), "column": column_mask(4), "conv": conv_mask(4, 3)}[pattern]
    assert torch.equal(mask[text:, text:], cells[:-1, :-1])


# --- their order ---


def test_the_paper_s_order_is_row_column_row_row_and_conv_at_last() -> None:
    patterns = DALLEConfig(dim=64, heads=1, layers=64, attention="dalle1").layer_patterns
    assert patterns[:8] == ("row", "column", "row", "row", "row", "column", "row", "row")
    assert (patterns.count("row"), patterns.count("column"), patterns.count("conv")) == (47, 16, 1)
    assert patterns[-1] == "conv" and patterns[61] == "column" and patterns[62] == "row"
    assert DALLEConfig(layers=1, attention="dalle1").layer_patterns == ("conv",)
    assert DALLEConfig(layers=3).layer_patterns == ("full",) * 3


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"attention": ["row", "conv"]}, "names 2 patterns for 4 layers"),
        ({"attention": "dalle1", "attention_kernel": 4}, "it must be odd"),
        ({"attention": "dalle1", "reading_share": 0.1}, "needs full attention.*set dalle.reading_share=0"),
        ({"attention": ["row", "diagonal", "row", "row"]}, "diagonal"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        DALLEConfig.model_validate({"layers": 4, **values})


def test_patterns_survive_a_checkpoint_and_the_command_line() -> None:
    recipe = Recipe.parse({}, ['dalle.attention=["row", "conv"]', "dalle.layers=2", "dalle.attention_kernel=3"])
    assert Recipe.parse(recipe.model_dump(mode="json")) == recipe
    assert Recipe.parse({}, ["dalle.attention=dalle1"]).dalle.attention == "dalle1"


# --- in the transformer ---


def _dalle(**values: Any) -> DALLE:
    config = DALLEConfig.model_validate({"dim": 16, "layers": 4, "heads": 2, "attention_kernel": 3, **values})
    dalle = DALLE(config, STREAM)
    randomize(dalle)
    return dalle.eval()


def _images(batch: int = 4) -> Tensor:
    return torch.randint(0, STREAM.image_vocab, (batch, N), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_layer_reads_just_the_cells_of_its_pattern(pattern: AttentionPattern) -> None:
    dalle = _dalle(attention=[pattern], layers=1, token_shift=False)
    text, images = some_captions(STREAM)[:1], _images(1)
    before = dalle(text, images)[1][0]
    mask = stream_mask(STREAM, pattern, 3)[STREAM.text_length :, STREAM.text_length :]
    for cell in range(N - 1):
        changed = images.clone()
        changed[0, cell] = (changed[0, cell] + 1) % STREAM.image_vocab
        moved = (dalle(text, changed)[1][0] - before).abs().amax(dim=1) > 1e-5
        assert moved[1:].tolist() == mask[:, cell].tolist()  # the output behind cell i predicts cell i + 1
    moved = (dalle(some_captions(STREAM)[1:2], images)[1][0] - before).abs().amax(dim=1) > 1e-5
    assert moved.all()


@torch.no_grad()
@pytest.mark.parametrize("values", MODELS, ids=str)
@pytest.mark.parametrize("chunks", [[1] * (N - 1), [N - 1], [2, 1, 7, 5]], ids=str)
def test_cached_and_packed_logits_equal_those_of_the_whole_stream(values: dict[str, Any], chunks: list[int]) -> None:
    dalle, text, images = _dalle(**values), some_captions(STREAM), _images()
    for captions in (text, torch.full_like(text, NULL), text[:, :4]):  # both branches, and fewer slots
        expected = dalle(captions, images)[1]
        for model in (dalle, Engine(dalle), Engine(dalle, is_plain=True)):
            logits, cache = model.prefill(captions)
            assert torch.allclose(logits, expected[:, 0], atol=1e-5)
            start = 0
            for count in chunks:
                logits = model.extend(images[:, start : start + count], cache)
                assert torch.allclose(logits, expected[:, start + 1 : start + 1 + count], atol=1e-5)
                start += count


@torch.no_grad()
@pytest.mark.parametrize("values", MODELS, ids=str)
def test_tokens_taken_back_leave_no_trace(values: dict[str, Any]) -> None:
    dalle, text, images = _dalle(**values), some_captions(STREAM), _images()
    expected = dalle(text, images)[1]
    for model in (dalle, Engine(dalle)):
        _, cache = model.prefill(text)
        model.extend(images[:, :3], cache)
        model.extend((images[:, 3:9] + 1) % STREAM.image_vocab, cache)
        cache.take_back(6)
        assert torch.allclose(model.extend(images[:, 3:-1], cache), expected[:, 4:], atol=1e-5)


@pytest.mark.parametrize("values", MODELS, ids=str)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_sampler_draws_what_the_slow_reference_draws(values: dict[str, Any], guidance: float) -> None:
    dalle, text, prompt = _dalle(**values), some_captions(STREAM)[:1], "a red circle"
    settings = SamplingConfig(guidance=guidance, top_k=8, precision="fp32")
    noise = gumbel_noise(torch.tensor([noise_key(2, prompt)]).expand(3), torch.arange(3), torch.arange(N), 11)
    slow = dalle.generate(
        text.expand(3, -1),
        lambda logits, index: choose(logits, settings, noise[:, index]),
        guidance=lambda index: guidance_scales(settings, N)[index],
    )
    ways: list[dict[str, Any]] = [*({"window": window} for window in (1, 2, 5, 99)), {"fixed": "eager"}]
    for way in ways:
        *_, last = stream_tokens(
            dalle, text, [prompt], [(0, number) for number in range(3)], seed=2, settings=settings, **way
        )
        assert torch.equal(last.ids, slow), way


@pytest.mark.parametrize("values", MODELS, ids=str)
def test_every_parameter_learns(values: dict[str, Any]) -> None:
    dalle = _dalle(**values)
    losses = dalle.loss(some_captions(STREAM), _images())
    losses.total(0.125, losses.num_text, losses.num_image).backward()
    assert [name for name, p in dalle.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
@pytest.mark.parametrize("values", MODELS, ids=str)
def test_the_loss_is_that_of_the_logits(values: dict[str, Any]) -> None:
    dalle, text, images = _dalle(**values), some_captions(STREAM), _images()
    logits = dalle(text, images)[1]
    expected = -logits.log_softmax(dim=-1).gather(2, images[:, :, None]).sum()
    assert dalle.loss(text, images).image_nll_sum.item() == pytest.approx(expected.item(), rel=1e-5)


@torch.no_grad()
def test_learned_positions_are_those_of_a_token_s_own_cell() -> None:
    dalle = _dalle(positions="learned", token_shift=False)
    text, images = some_captions(STREAM)[:1], _images(1)
    before = dalle.embed(text, images[:, :-1])[0]
    dalle.target_row.weight[2] += 1.0
    dalle.target_column.weight[3] += 10.0
    change = (dalle.embed(text, images[:, :-1])[0] - before).amax(dim=1).round()
    expected = [(row == 2) + 10.0 * (column == 3) for row, column in product(range(4), repeat=2)][:-1]
    assert change.tolist() == [0.0] * STREAM.text_length + expected


# --- in the caches ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_s_own_attention_honours_a_mask(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 3, 16, 8, generator=torch.Generator().manual_seed(0))
    mask = row_mask(4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    found = attend(q.to(dtype), k.to(dtype), v.to(dtype), mask, 0.0, False).float()
    assert torch.allclose(found, expected, atol=1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("counts", [[1] * 12, [CHUNK - 3, 1, 1, 6, 1, 20, 5]], ids=["one by one", "mixed"])
def test_bags_and_products_mix_what_the_mask_lets_them_see(counts: list[int]) -> None:
    capacity, generator = sum(counts), torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, capacity, 3, 8, generator=generator)
    mask = torch.rand(capacity, capacity, generator=generator) < 0.3
    mask = (mask | torch.eye(capacity, dtype=torch.bool)).tril()
    heads_first = [part.transpose(1, 2) for part in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2).flatten(2)
    for cache in (KVCache.allocate(1, 2, 3, capacity, 8), BagCache.allocate(1, 2, 3, capacity, 8)):
        start = 0
        for count in counts:
            part = slice(start, start + count)
            mixed = cache.mix(0, q[:, part] * 8**-0.5, k[:, part], v[:, part], mask[part, : part.stop])
            assert torch.allclose(mixed, expected[:, part], atol=1e-5)
            cache.advance(count)
            start += count
