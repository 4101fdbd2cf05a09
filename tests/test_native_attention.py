"""Attention in compiled code: the same numbers as PyTorch's operations, forward and backward, always the same bits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from dalle_mini_impl import compiled
from dalle_mini_impl.layers import attention, native_attention
from dalle_mini_impl.layers.attention import Attention

needs_kernel = pytest.mark.skipif(
    not native_attention.has_kernel(), reason="this processor doesn't multiply bf16, or there is no compiler"
)
SHAPES = [  # sequences, tokens, heads, numbers in a head
    (2, 17, 2, 32),
    (3, 97, 3, 64),
    (2, 1, 1, 64),
    (4, 8, 3, 96),
    (2, 64, 1, 128),
    (1, 287, 2, 64),
]


def _attention(heads: int, head_dim: int, *, causal: bool) -> Attention:
    torch.manual_seed(0)
    module = Attention(heads * head_dim, heads, causal=causal)
    torch.nn.init.normal_(module.out.weight, std=0.1)
    for norm in (module.query_norm, module.key_norm):
        torch.nn.init.normal_(norm.weight, mean=1.5, std=0.3)
    return module


def _rope(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angles = 6 * torch.rand((length, head_dim // 2), generator=torch.Generator().manual_seed(1))
    return angles.cos(), angles.sin()


def _pass(
    module: Attention, x: Tensor, rope: tuple[Tensor, Tensor] | None, *, is_brief: bool = True
) -> dict[str, Tensor]:
    """What comes out, and all gradients of a weighted sum of it."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_brief):
        out = module(x, rope)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out.float() * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"out": out.detach().float(), "x": x.grad, **gradients}  # type: ignore[dict-item]


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-6))


@needs_kernel
@pytest.mark.parametrize("is_turned", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_nearer_to_fp32_than_pytorch_s_operations(
    shape: tuple[int, int, int, int], causal: bool, is_turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, length, heads, head_dim = shape
    module = _attention(heads, head_dim, causal=causal)
    x = torch.randn(batch, length, heads * head_dim)
    rope = _rope(length, head_dim) if is_turned else None
    exact = _pass(module, x, rope, is_brief=False)
    fast = _pass(module, x, rope)
    monkeypatch.setattr(attention, "can_attend", lambda *_: False)
    slow = _pass(module, x, rope)
    names = set(exact) if length > 1 else set(exact) - {"query_norm.weight", "key_norm.weight"}  # one share is 1
    for name in names:
        assert _distance(fast[name], exact[name]) < 0.025, name
        assert _distance(fast[name], exact[name]) < 1.2 * _distance(slow[name], exact[name]) + 1e-4, name
    if length == 1:
        assert float(fast["query_norm.weight"].abs().max()) < 1e-2


@needs_kernel
def test_it_runs_where_it_can_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = attention.attend_natively
    monkeypatch.setattr(attention, "attend_natively", lambda *given: calls.append(1) or real(*given))
    module = _attention(2, 64, causal=True)
    x, rope = torch.randn(2, 9, 128), _rope(9, 64)
    _pass(module, x, rope)
    assert len(calls) == 1
    _pass(module, x, rope, is_brief=False)
    module.dropout = 0.5
    _pass(module, x, rope)
    module.dropout = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        module(x, rope, torch.ones(9, 9, dtype=torch.bool).tril())
        module(x, tuple(table.expand(2, 1, -1, -1) for table in rope))
    _pass(_attention(2, 40, causal=True), torch.randn(2, 9, 80), None)
    longest = native_attention.LONGEST
    _pass(module, torch.randn(1, longest + 1, 128), None)
    assert len(calls) == 1
    _pass(module, torch.randn(1, longest, 128), None)
    assert len(calls) == 2


@needs_kernel
def test_no_token_sees_a_later_one() -> None:
    module = _attention(1, 64, causal=True)
    x = torch.randn(1, 40, 64)
    changed = x.clone()
    changed[:, 25:] += 3
    outs = [_pass(module, value, _rope(40, 64))["out"] for value in (x, changed)]
    assert torch.equal(outs[0][:, :25], outs[1][:, :25])
    assert not torch.equal(outs[0][:, 25:], outs[1][:, 25:])


@needs_kernel
def test_a_sequence_s_bits_don_t_depend_on_the_others_and_all_bits_repeat() -> None:
    module = _attention(3, 64, causal=True)
    x, rope = torch.randn(5, 33, 192), _rope(33, 64)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        qkv = module.qkv(x)
    weights = module.query_norm.weight.detach(), module.key_norm.weight.detach()

    def mixed(qkv: Tensor) -> Tensor:
        return native_attention.attend(qkv, *weights, rope, 3, True)

    assert torch.equal(mixed(qkv)[2:3], mixed(qkv[2:3]))
    first, second = (_pass(module, x, rope) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_kernel
def test_pytorch_takes_it_for_an_operation_of_its_own() -> None:
    qkv = torch.randn(2, 5, 96, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(32, requires_grad=True)
    cos, sin = _rope(5, 32)
    torch.library.opcheck(
        native_attention._forward,
        (qkv, weight, weight.detach().clone().requires_grad_(), cos, sin, 1, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_without_the_kernel_attention_is_pytorch_s() -> None:
    code = (
        "from dalle_mini_impl.layers import native_attention as n; import torch; "
        "print(n.has_kernel(), n.can_attend(torch.zeros(1, 4, 96, dtype=torch.bfloat16), 1))"
    )
    for wish in ("0", "avx2"):
        environment = {**os.environ, compiled.SWITCH: wish}
        said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert said.stdout.split() == ["False", "False"]
