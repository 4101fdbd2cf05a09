"""Attention in compiled code: the same numbers as PyTorch's operations, forward and backward, always the same bits."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from dalle_mini_impl import compiled
from dalle_mini_impl.layers import attention, native_attention
from dalle_mini_impl.layers.attention import Attention

FP32, BF16 = torch.float32, torch.bfloat16
TYPES = [
    pytest.param(
        dtype, id=str(dtype), marks=pytest.mark.skipif(dtype not in native_attention.kernel_types(), reason=reason)
    )
    for dtype, reason in (
        (FP32, "the kernel can't be compiled here"),
        (BF16, "this processor doesn't multiply bf16, or the kernel can't be compiled here"),
    )
]
each_type = pytest.mark.parametrize("dtype", TYPES)
SHAPES = [  # sequences, tokens, heads, numbers in a head
    (2, 17, 2, 32),
    (3, 97, 3, 64),
    (2, 1, 1, 64),
    (4, 8, 3, 96),
    (2, 64, 1, 128),
    (1, 287, 2, 64),
    (1, 5, 2, 128),
    (2, 97, 1, 96),
    (1, 288, 1, 32),
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
    module: Attention,
    x: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype = FP32,
    *,
    is_native: bool = True,
) -> dict[str, Tensor]:
    """What comes out, and all gradients of a weighted sum of it. bf16 is autocast's."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", BF16, enabled=dtype == BF16):
        if not is_native:
            patch.setattr(attention, "can_attend", lambda *_: False)
        out = module(x, rope)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights.to(x.dtype)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **gradients}  # type: ignore[dict-item]


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp(min=1e-6))


@each_type
@pytest.mark.parametrize("is_turned", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_nearer_to_the_truth_than_pytorch_s_operations(
    shape: tuple[int, int, int, int], causal: bool, is_turned: bool, dtype: torch.dtype
) -> None:
    batch, length, heads, head_dim = shape
    module = _attention(heads, head_dim, causal=causal)
    x = torch.randn(batch, length, heads * head_dim)
    rope = _rope(length, head_dim) if is_turned else None
    fast, slow = _pass(module, x, rope, dtype), _pass(module, x, rope, dtype, is_native=False)
    double = (rope[0].double(), rope[1].double()) if rope else None
    exact = _pass(copy.deepcopy(module).double(), x.double(), double, is_native=False)
    names = set(exact) if length > 1 else set(exact) - {"query_norm.weight", "key_norm.weight"}  # one share is 1
    most, around = (1e-5, 1e-6) if dtype == FP32 else (0.025, 1e-4)
    for name in names:
        assert fast[name].dtype == slow[name].dtype, name
        assert _distance(fast[name], exact[name]) < most, name
        assert _distance(fast[name], exact[name]) < 1.2 * _distance(slow[name], exact[name]) + around, name
    if length == 1:
        assert float(fast["query_norm.weight"].abs().max()) < most


@each_type
def test_it_runs_where_it_can_and_nowhere_else(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = attention.attend_natively
    monkeypatch.setattr(attention, "attend_natively", lambda *given: calls.append(1) or real(*given))
    module = _attention(2, 64, causal=True)
    x, rope = torch.randn(2, 9, 128), _rope(9, 64)
    _pass(module, x, rope, dtype)
    assert len(calls) == 1
    _pass(copy.deepcopy(module).double(), x.double(), None)
    module.dropout = 0.5
    _pass(module, x, rope, dtype)
    module.dropout = 0.0
    with torch.autocast("cpu", BF16, enabled=dtype == BF16):
        module(x, rope, torch.ones(9, 9, dtype=torch.bool).tril())
        module(x, tuple(table.expand(2, 1, -1, -1) for table in rope))
    _pass(_attention(2, 40, causal=True), torch.randn(2, 9, 80), None, dtype)
    longest = native_attention.LONGEST
    _pass(module, torch.randn(1, longest + 1, 128), None, dtype)
    assert len(calls) == 1
    _pass(module, torch.randn(1, longest, 128), None, dtype)
    assert len(calls) == 2
    _pass(module.eval(), x, rope, dtype)
    assert len(calls) == (2 if dtype == FP32 else 3), "evaluation in fp32 is PyTorch's"


@each_type
def test_no_token_sees_a_later_one(dtype: torch.dtype) -> None:
    module = _attention(1, 64, causal=True)
    x = torch.randn(1, 40, 64)
    changed = x.clone()
    changed[:, 25:] += 3
    outs = [_pass(module, value, _rope(40, 64), dtype)["out"] for value in (x, changed)]
    assert torch.equal(outs[0][:, :25], outs[1][:, :25])
    assert not torch.equal(outs[0][:, 25:], outs[1][:, 25:])


@each_type
def test_a_sequence_s_bits_don_t_depend_on_the_others_and_all_bits_repeat(dtype: torch.dtype) -> None:
    module = _attention(3, 64, causal=True)
    x, rope = torch.randn(5, 33, 192), _rope(33, 64)
    qkv = module.qkv(x).detach().to(dtype)
    weights = module.query_norm.weight.detach(), module.key_norm.weight.detach()

    def mixed(qkv: Tensor) -> tuple[Tensor, Tensor]:
        qkv = qkv.clone().requires_grad_()
        out = native_attention.attend(qkv, *weights, rope, 3, True)
        (gradient,) = torch.autograd.grad((out * out).sum(), qkv)
        return out, gradient

    expected = mixed(qkv)
    for whole, alone in zip(expected, mixed(qkv[2:3]), strict=True):
        assert whole.dtype == dtype and torch.equal(whole[2:3], alone)
    first, second = (_pass(module, x, rope, dtype) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    threads = torch.get_num_threads()
    try:
        for other in (2, 3, 20):  # more than there are sequences and heads, too
            torch.set_num_threads(other)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(mixed(qkv), expected, strict=True))
            shared = _pass(module, x, rope, dtype)
            assert all(torch.allclose(shared[name], first[name], rtol=1e-3, atol=1e-3) for name in first)
    finally:
        torch.set_num_threads(threads)


@each_type
def test_pytorch_takes_it_for_an_operation_of_its_own(dtype: torch.dtype) -> None:
    qkv = torch.randn(2, 5, 96, dtype=dtype, requires_grad=True)
    weight = torch.ones(32, requires_grad=True)
    cos, sin = _rope(5, 32)
    torch.library.opcheck(
        native_attention._forward,
        (qkv, weight, weight.detach().clone().requires_grad_(), cos, sin, 1, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    mixed, log_sums = native_attention._forward(qkv, weight, weight, cos, sin, 1, True)
    given = torch.ones_like(mixed), qkv, weight, weight.detach().clone(), cos, sin, log_sums, True
    given = tuple(value.detach() if isinstance(value, Tensor) else value for value in given)
    torch.library.opcheck(native_attention._backward, given, test_utils=("test_schema", "test_faketensor"))


def test_vectors_of_avx2_do_the_same() -> None:
    kernel = native_attention.kernel()
    if kernel is None or kernel.lanes() == 8:
        pytest.skip("there is no kernel, or its vectors are those of AVX2, which the other tests have used")
    chosen = "float32 and (nearer or sees or bits)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    environment = {**os.environ, compiled.SWITCH: "avx2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout, done.stdout


def test_without_the_kernel_attention_is_pytorch_s() -> None:
    code = (
        "from dalle_mini_impl.layers import native_attention as n; import torch; "
        "print(*(n.can_attend(torch.zeros(1, 4, 96, dtype=dtype), 1) for dtype in (torch.float32, torch.bfloat16)))"
    )
    has_fp32 = FP32 in native_attention.kernel_types()
    for wish, expected in (("0", [False, False]), ("avx2", [has_fp32, False])):
        environment = {**os.environ, compiled.SWITCH: wish}
        said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert said.stdout.split() == [str(value) for value in expected], wish
