"""Compiled training blocks: the same numbers as plain ones, only in training, only where it pays and works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dalle_mini_impl.config import StageConfig
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.stream import PAD
from dalle_mini_impl.training import compiling
from dalle_mini_impl.training.compiling import LONG_ENOUGH_SEC, LONG_ENOUGH_STEPS, can_compile, should_compile
from tests.tiny import tiny_bundle


def dalle(*overrides: str) -> DALLE:
    model = tiny_bundle(*overrides).dalle
    assert model is not None
    return model.train()


def loss_and_gradients(model: DALLE) -> list[torch.Tensor]:
    text = torch.randint(5, 20, (4, model.stream.text_length), generator=torch.Generator().manual_seed(0))
    ids = torch.randint(32, (4, 16), generator=torch.Generator().manual_seed(1))
    reads = None if model.reading is None else torch.tensor([True, False, False, False])
    losses = model.loss(text, ids, reads=reads)
    total = losses.text_nll_sum + losses.image_nll_sum + losses.read_nll_sum
    return [total, *torch.autograd.grad(total, list(model.parameters()))]


def use_backend(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Lets torch.compile use a backend; returns what it has compiled since."""
    compiled: list[Any] = []
    real = torch.compile

    def compile_(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return real(function, backend=name, **options)

    monkeypatch.setattr(torch, "compile", compile_)
    return compiled


@pytest.mark.parametrize("override", ["dalle.reading_share=0.25", 'dalle.attention=["row", "full"]'])
def test_compiled_blocks_give_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    plain, compiled = dalle(override), dalle(override)
    use_backend(monkeypatch, "aot_eager")
    compiled.compile_blocks()
    for ours, theirs in zip(loss_and_gradients(compiled), loss_and_gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_only_batches_whose_captions_take_as_many_slots_run_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dalle("text.slot_step=4")
    shapes = []
    monkeypatch.setattr(torch, "compile", lambda block, **_: lambda *a: shapes.append(a[1].shape[:2]) or block(*a))
    model.compile_blocks()
    text, ids = torch.full((3, model.stream.text_length), PAD), torch.zeros((3, 16), dtype=torch.long)
    text[:, :4] = 7
    model.loss(text, ids)
    assert shapes == [(3, 4 + 15)] * len(model.blocks)
    text[0, :8] = 7
    model.loss(text, ids)
    model(text[:, :8], ids)
    assert len(shapes) == len(model.blocks)


def test_only_training_steps_run_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dalle()
    calls = []
    monkeypatch.setattr(torch, "compile", lambda block, **_: lambda *a: calls.append(1) or block(*a))
    model.compile_blocks()
    text, ids = torch.full((1, model.stream.text_length), 7), torch.zeros((1, 16), dtype=torch.long)
    with torch.no_grad():
        model.loss(text, ids)
        model.prefill(text)
    model.eval().loss(text, ids)
    assert not calls
    model.train().loss(text, ids)
    assert len(calls) == len(model.blocks)


def test_auto_compiles_long_stages_of_models_with_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "can_compile", lambda device: True)
    model, config = dalle(), StageConfig(steps=LONG_ENOUGH_STEPS)
    assert should_compile("dalle", config, model, None)
    assert should_compile("dalle", config, model, LONG_ENOUGH_SEC)
    assert not should_compile("dalle", config, model, LONG_ENOUGH_SEC - 1), "a budget replaces the steps"
    assert not should_compile("dalle", StageConfig(steps=LONG_ENOUGH_STEPS - 1), model, None)
    assert not should_compile("vae", config, nn.Linear(1, 1), None)
    assert dalle("text.slot_step=4").num_lengths == 4
    assert should_compile("dalle", StageConfig(steps=4 * LONG_ENOUGH_STEPS), dalle("text.slot_step=4"), None)
    assert not should_compile("dalle", StageConfig(steps=3 * LONG_ENOUGH_STEPS), dalle("text.slot_step=4"), None)
    assert not should_compile("distill", StageConfig(steps=10**6), dalle("text.slot_step=4"), None)
    config = StageConfig(steps=10**6)
    assert not should_compile("dalle", config, dalle("text.slot_step=2"), None), "each length is compiled by itself"
    monkeypatch.setattr(compiling, "can_compile", lambda device: False)
    assert not should_compile("dalle", config, model, None)


def test_what_is_asked_for_is_done_or_refused() -> None:
    assert should_compile("dalle", StageConfig(compile=True, steps=1), dalle(), None)
    assert not should_compile("dalle", StageConfig(compile=False, steps=10**6), dalle(), None)
    with pytest.raises(ValueError, match=r"train\.vae\.compile is true, but only dalle"):
        should_compile("vae", StageConfig(compile=True), nn.Linear(1, 1), None)


def test_a_machine_without_a_compiler_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_backend(monkeypatch, "aot_eager")
    assert can_compile(torch.device("cpu"))

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no working C++ compiler found\nmore of it")

    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level("INFO", logger="dalle_mini_impl.training"):
        assert not can_compile(torch.device("cpu"))
    assert "doesn't work here" in caplog.text and "no working C++ compiler found)" in caplog.text
