"""A pass has as many operations whatever computes its attention; the faults were kernels that counted as nothing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dalle_mini_impl.bench import train
from dalle_mini_impl.bench.peers import Shape
from dalle_mini_impl.estimate import estimate
from dalle_mini_impl.flops import count_flops, hidden_flops
from dalle_mini_impl.layers import attention, native_attention
from dalle_mini_impl.layers.attention import Attention
from tests.tiny import tiny_recipe

SHAPE = Shape(dim=64, layers=2, heads=2, text_length=8, grid_size=3, text_vocab=300, image_vocab=32)
TOKENS = 8 + 9 - 1
SQUARES = 2 * 4 * 64 * TOKENS**2
LINEAR = 2 * (12 * 2 * 64**2 * TOKENS + 64 * (7 * 300 + 9 * 32))
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_native", [True, False])
def test_the_bench_counts_linear_layers_and_whole_squares_of_attention(
    is_native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_native and dtype not in native_attention.kernel_types():
        pytest.skip("there is no such kernel here")
    calls = []
    real = attention.attend_natively
    monkeypatch.setattr(attention, "attend_natively", lambda *given: calls.append(1) or real(*given))
    if not is_native:
        monkeypatch.setattr(attention, "can_attend", lambda *_: False)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        contestant = train._ours(SHAPE, CPU, "adamw", is_compiled=False)
    assert bool(calls) == is_native
    assert contestant.flops == LINEAR + SQUARES


def test_half_of_the_squares_but_for_the_diagonal_is_hidden() -> None:
    contestant = train._ours(SHAPE, CPU, "adamw", is_compiled=False)
    seen = TOKENS * (TOKENS + 1) / 2
    assert SQUARES - contestant.hidden == 2 * 4 * 64 * seen
    assert hidden_flops(1, 64, 2) == 0


def test_backward_counts_as_pytorch_counts_its_own_attention() -> None:
    if torch.float32 not in native_attention.kernel_types():
        pytest.skip("the kernel can't be compiled here")
    module = Attention(64, 2, causal=True)
    x = torch.randn(3, 5, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        module(x).sum().backward()
    square, linear = 2 * 3 * 5**2 * 64, 2 * 3 * 5 * 64 * 4 * 64
    assert counter.get_total_flops() == (2 + 5) * square + 3 * linear


def test_estimates_and_benchmarks_count_alike() -> None:
    values = ["dalle.dim=64", "dalle.heads=2", "text.max_length=8", "data.image_size=12", "text.vocab_size=300"]
    assert estimate(tiny_recipe(*values)).stages["dalle"].forward_flops == LINEAR + SQUARES


def test_attention_over_other_keys_counts_them() -> None:
    query, key = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 5, 8)
    flops, _ = count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(query, key, key))
    assert flops == 2 * 2 * 2 * 3 * 5 * 8
