"""Faults forbidden here: drawing or training in a bf16 that the device only emulates, each by a rule of its own."""

from __future__ import annotations

import pytest
import torch

from dalle_mini_impl import precision, sampling
from dalle_mini_impl.precision import autocast_off, computes_bf16
from dalle_mini_impl.training import task

CPU = torch.device("cpu")


def _processor(monkeypatch: pytest.MonkeyPatch, *, avx512_bf16: bool, amx: bool, machine: str = "x86_64") -> None:
    monkeypatch.setattr(precision.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


@pytest.mark.parametrize(("avx512_bf16", "amx"), [(False, False), (True, False), (False, True), (True, True)])
def test_an_x86_cpu_computes_bf16_where_it_has_instructions_for_it(
    avx512_bf16: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _processor(monkeypatch, avx512_bf16=avx512_bf16, amx=amx)
    assert computes_bf16(CPU) == (avx512_bf16 or amx)


def test_an_arm_cpu_is_not_asked_for_x86_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)())
    _processor(monkeypatch, avx512_bf16=not answer, amx=not answer, machine="aarch64")
    assert computes_bf16(CPU) == answer


def test_other_devices_compute_in_fp32() -> None:
    assert not computes_bf16(torch.device("mps"))


@pytest.mark.parametrize("is_native", [False, True])
def test_drawing_and_training_take_the_same_type(is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sampling, task):
        monkeypatch.setattr(module, "computes_bf16", lambda device: is_native)
    assert sampling.resolve_precision("auto", CPU) == ("bf16" if is_native else "fp32")
    assert task.autocast_dtype("auto", CPU) == (torch.bfloat16 if is_native else None)
    for asked, dtype in (("bf16", torch.bfloat16), ("fp32", None)):
        assert sampling.resolve_precision(asked, CPU) == asked
        assert task.autocast_dtype(asked, CPU) == dtype


def test_what_has_to_be_exact_is_exact_and_runs_where_only_shapes_are_known() -> None:
    rows = torch.full((2, 300), 1.001)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = rows @ rows.t()
        with autocast_off(CPU):
            exact = rows @ rows.t()
    assert rounded.dtype == torch.bfloat16 and exact.dtype == torch.float32
    with autocast_off(torch.device("meta")):
        assert (rows.to("meta") @ rows.t().to("meta")).shape == (2, 2)
