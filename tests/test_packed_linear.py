"""Packed products equal plain ones, in each of their forms, and each row has its own bits."""

from __future__ import annotations

import pytest
import torch

from dalle_mini_impl.layers import packed_linear
from dalle_mini_impl.layers.packed_linear import PackedLinear

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 16), (5, 16), (2, 3, 16)], ids=str)
def test_packed_equals_plain(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, x, other = (
        torch.randn(24, 16).to(dtype),
        torch.randn(shape).to(dtype),
        torch.randn(*shape[:-1], 24).to(dtype),
    )
    packed, plain = PackedLinear(weight), PackedLinear(weight, is_packed=False)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for ours, theirs in [
        (packed(x), plain(x)),
        (packed.relu(x), plain.relu(x)),
        (packed.plus(x, other), plain.plus(x, other)),
    ]:
        assert ours.shape == (*shape[:-1], 24) and ours.dtype == dtype
        assert torch.allclose(ours, theirs, atol=tolerance)
    assert (packed.relu(x) >= 0).all() and (packed(x) < 0).any()


@DTYPES
@pytest.mark.skipif(not packed_linear.can_pack(torch.device("cpu")), reason="this build has no packed kernels")
def test_a_row_has_the_same_bits_with_any_number_of_others(dtype: torch.dtype) -> None:
    linear, x = PackedLinear(torch.randn(96, 64).to(dtype)), torch.randn(40, 64).to(dtype)
    whole = linear(x)
    assert all(torch.equal(linear(x[:rows]), whole[:rows]) for rows in (1, 2, 3, 6, 16, 31))


def test_without_the_kernels_it_is_the_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "can_pack", lambda *_: False)
    weight, x = torch.randn(8, 4), torch.randn(3, 4)
    assert torch.equal(PackedLinear(weight)(x), torch.nn.functional.linear(x, weight))
