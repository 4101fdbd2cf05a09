"""The compiled decoder: the logits of the readable model, bits that depend on nothing else, and no harm without it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dalle_mini_impl import compiled
from dalle_mini_impl.config import DALLEConfig, SamplingConfig
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.engine import Engine
from dalle_mini_impl.filters import choose, guide
from dalle_mini_impl.native import trunk
from dalle_mini_impl.native.choice import choose as native_choose
from dalle_mini_impl.native.kernel import SOURCE, kernel
from dalle_mini_impl.native.trunk import NativeCache, can_run, lanes, pack
from dalle_mini_impl.sampling import stream_tokens
from dalle_mini_impl.stream import Stream
from tests.tiny import randomize, some_captions

STREAM = Stream(text_length=6, grid_size=5, text_vocab=20, image_vocab=43)
N = STREAM.num_image_tokens
LIBRARY = kernel()
CPU = torch.device("cpu")
needs_bf16 = pytest.mark.skipif(LIBRARY is None or not LIBRARY.has_brief(), reason="this processor has no bf16 kernel")
TYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16, id="bf16")]

needs_kernel = pytest.mark.skipif(LIBRARY is None, reason="the decoder's kernel can't be compiled here")


def _dalle(**values: object) -> DALLE:
    dalle = DALLE(DALLEConfig.model_validate({"dim": 32, "layers": 2, "heads": 2, **values}), STREAM)
    randomize(dalle)
    return dalle.eval()


def _images(batch: int = 4) -> Tensor:
    return torch.randint(0, STREAM.image_vocab, (batch, N), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _logits(engine: Engine, text: Tensor, images: Tensor, counts: list[int]) -> Tensor:
    """Logits (B, N, V) of pictures that are read so many tokens at a time."""
    first, cache = engine.prefill(text)
    assert isinstance(cache, NativeCache)
    parts, start = [first[:, None]], 0
    for count in counts:
        parts.append(engine.extend(images[:, start : start + count], cache))
        start += count
    return torch.cat(parts, dim=1)


ONE_BY_ONE = [1] * (N - 1)
MODELS = [
    {},
    {"token_shift": False},
    {"neighbours": ["above", "two_left"]},
    {"dim": 96, "heads": 1},
    {"dim": 80, "heads": 1, "ffn_multiple": 1.3},
    {"dim": 64, "heads": 4, "positions": "learned"},
]


@needs_kernel
@pytest.mark.parametrize("counts", [ONE_BY_ONE, [N - 1], [2, 1, 17, 4]], ids=["one by one", "at once", "some"])
@pytest.mark.parametrize("values", MODELS, ids=str)
def test_logits_equal_those_of_the_whole_stream(values: dict[str, object], counts: list[int]) -> None:
    dalle, text, images = _dalle(**values), some_captions(STREAM), _images()
    with torch.no_grad():
        expected = dalle(text, images)[1]
    assert torch.allclose(_logits(Engine(dalle), text, images, counts), expected, atol=1e-5)


@needs_kernel
@needs_bf16
@pytest.mark.parametrize("values", MODELS, ids=str)
def test_bf16_is_as_near_as_pytorch_s_operations_in_bf16(values: dict[str, object]) -> None:
    dalle, text, images = _dalle(**values), some_captions(STREAM), _images()
    with torch.no_grad():
        expected = dalle(text, images)[1]
        ours = _logits(Engine(dalle, torch.bfloat16), text, images, [N - 1])
        engine = Engine(dalle, torch.bfloat16, is_native=False)
        theirs = engine.extend(images[:, :-1], engine.prefill(text)[1])
    error = (ours - expected).abs().mean()
    assert 0 < error < 0.02 * expected.abs().mean()
    assert error < 1.2 * (theirs - expected[:, 1:]).abs().mean()


@needs_kernel
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_bits_depend_on_no_other_row_nor_on_tokens_at_once_nor_on_threads(dtype: torch.dtype) -> None:
    engine = Engine(_dalle(neighbours=["above", "above_left"]), dtype)
    text, images = some_captions(STREAM).repeat(6, 1), _images(24)
    whole = _logits(engine, text, images, ONE_BY_ONE)
    for rows in ([0], [3, 5], [1, 2, 3, 4, 5, 6, 7]):
        assert torch.equal(_logits(engine, text[rows], images[rows], ONE_BY_ONE), whole[rows]), rows
    for counts in ([N - 1], [2, 1, 17, 4]):
        assert torch.equal(_logits(engine, text, images, counts), whole), counts
    threads = torch.get_num_threads()
    try:
        for other in (1, 2, 3, 5):
            torch.set_num_threads(other)
            assert torch.equal(_logits(engine, text, images, [3, *ONE_BY_ONE[:-3]]), whole), other
    finally:
        torch.set_num_threads(threads)


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("counts", [ONE_BY_ONE, [N - 1], [2, 1, 17, 4]], ids=["one by one", "at once", "some"])
@pytest.mark.parametrize("values", MODELS, ids=str)
def test_rows_share_what_was_prefilled(values: dict[str, object], counts: list[int]) -> None:
    dalle, text, rows = _dalle(**values), some_captions(STREAM), torch.tensor([2, 0, 0, 1, 2])
    engine, images = Engine(dalle), _images(5)
    expected = dalle(text[rows], images)[1]
    prefilled = engine.prefill(text)[1]
    filled = prefilled.values[:, :, :, : prefilled.length]
    before, cache = filled.clone(), prefilled.select(rows)
    assert isinstance(cache, NativeCache) and cache.prompts is prefilled and cache.length == prefilled.length
    assert cache.capacity == prefilled.capacity and cache.values.shape[3] == N - 1
    start = 0
    for count in counts:
        logits = engine.extend(images[:, start : start + count], cache)
        start += count
        assert torch.allclose(logits, expected[:, start - count + 1 : start + 1], atol=1e-5)
    assert torch.equal(filled, before), "they write to caches of their own"


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_that_share_are_chosen_and_joined(dtype: torch.dtype) -> None:
    engine, text, images = Engine(_dalle(neighbours=["above", "above_left"]), dtype), some_captions(STREAM), _images()
    one, two = (engine.prefill(text[rows])[1].select(torch.tensor([0, 1, 1, 0])) for rows in ([0, 1], [1, 2]))
    first, second = (engine.extend(images[:, : N - 2], cache)[:, -1] for cache in (one, two))
    last = images[:, N - 2 : N - 1]
    both = one.beside(two)
    chosen = both.select(torch.tensor([6, 1, 6]))
    joined = engine.extend(torch.cat([last, last]), both)
    assert torch.equal(joined[:4], engine.extend(last, one)) and torch.equal(joined[4:], engine.extend(last, two))
    assert torch.equal(engine.extend(last[[2, 1, 2]], chosen), joined[[6, 1, 6]])
    assert not torch.equal(first, second) and (both.length, both.prompt_length) == (one.length, one.prompt_length)
    with pytest.raises(ValueError, match="a cache that shares its prompts can't be one with"):
        one.beside(engine.prefill(text[:2])[1])


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_tokens_taken_back_leave_no_trace(dtype: torch.dtype) -> None:
    engine, text, images = Engine(_dalle(), dtype), some_captions(STREAM), _images()
    expected = _logits(engine, text, images, ONE_BY_ONE)
    _, cache = engine.prefill(text)
    wrong = (images + 1) % STREAM.image_vocab
    start = 0
    while start < N - 1:
        count = min(4, N - 1 - start)
        guess = torch.cat([images[:, start : start + 1], wrong[:, start + 1 : start + count]], dim=1)
        logits = engine.extend(guess, cache)
        assert torch.equal(logits[:, 0], expected[:, start + 1])
        cache.take_back(count - 1)
        start += 1


@needs_kernel
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_pictures_are_the_same_alone_together_and_by_guessing_ahead(dtype: torch.dtype) -> None:
    engine, text = Engine(_dalle(neighbours=["above", "above_left"]), dtype), some_captions(STREAM)[:1]
    settings = SamplingConfig(guidance=3.0, guidance_schedule="linear", top_p=0.9)

    def draw(candidates: list[int], window: int) -> Tensor:
        rows = [(0, candidate) for candidate in candidates]
        *_, last = stream_tokens(engine, text, ["a red circle"], rows, seed=3, settings=settings, window=window)
        return last.ids

    together = draw([0, 1, 2, 3, 4, 5, 6], 1)
    assert len({tuple(row) for row in together.tolist()}) > 1
    assert torch.equal(draw([2], 1)[0], together[2])
    assert torch.equal(draw([2, 5], 8), together[[2, 5]])


SETTINGS = [
    {"top_p": 1.0},
    {"top_p": 0.9},
    {"top_k": 5, "top_p": 1.0},
    {"top_k": 20, "top_p": 0.7, "temperature": 0.6},
    {"min_p": 0.1, "top_p": 1.0, "temperature": 1.7},
    {"min_p": 0.3, "top_p": 0.95, "top_k": 30},
    {"top_k": 1},
    {"top_p": 0.01},
    {"temperature": 0.0},
]


@needs_kernel
@pytest.mark.parametrize("is_guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_what_is_chosen_is_what_the_filters_choose(values: dict[str, float], is_guided: bool) -> None:
    settings = SamplingConfig.model_validate({"top_k": 0, "temperature": 1.0, **values})
    generator = torch.Generator().manual_seed(4)
    for vocab in (43, 64, 1):
        conditional, null = torch.randn((2, 150, 3, vocab), generator=generator) * 3
        noise = -torch.empty((150, 5, vocab)).exponential_(generator=generator).log()[:, 1:4]
        scales = torch.tensor([1.0, 2.5, 4.0]) if is_guided else torch.ones(3)
        logits = guide(conditional, null, scales) if is_guided else conditional
        ids, likelihoods, of_null = native_choose(conditional, null if is_guided else None, scales, settings, noise)
        assert torch.equal(ids, choose(logits, settings, noise))
        expected = conditional.log_softmax(dim=-1).gather(2, ids[..., None])[..., 0]
        assert torch.allclose(likelihoods, expected, atol=1e-5)
        if of_null is not None:
            assert torch.allclose(of_null, null.log_softmax(dim=-1).gather(2, ids[..., None])[..., 0], atol=1e-5)
        assert (of_null is not None) == is_guided


@needs_kernel
def test_a_pass_beyond_the_cache_is_refused() -> None:
    engine, text, images = Engine(_dalle()), some_captions(STREAM), _images()
    _, cache = engine.prefill(text)
    assert isinstance(cache, NativeCache) and engine._native is not None
    with pytest.raises(ValueError, match=f"holds {cache.capacity} tokens; {cache.length + 26} were asked for"):
        engine._native(torch.zeros(4, 26, 32), torch.arange(26), cache)
    assert images.shape[1] == N


@pytest.mark.parametrize(
    "values",
    [{"ffn": "swiglu"}, {"ffn": "gelu"}, {"dim": 24}, {"attention": ["full", "row"]}],
    ids=str,
)
def test_other_models_are_left_to_pytorch(values: dict[str, object]) -> None:
    dalle = _dalle(**values)
    assert not can_run(dalle.config, CPU, torch.float32)
    text, images = some_captions(STREAM), _images()
    with torch.no_grad():
        engine = Engine(dalle)
        logits = engine.extend(images[:, :-1], engine.prefill(text)[1])
        assert torch.allclose(logits, dalle(text, images)[1][:, 1:], atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packing_puts_each_weight_into_its_panel(dtype: torch.dtype) -> None:
    size = 2 * lanes()
    weight = torch.arange((size + 8) * 6, dtype=torch.float32).view(-1, 6).to(dtype)
    packed = pack(weight)
    for channel, depth in ((0, 0), (size - 1, 5), (size, 1), (size + 7, 4)):
        panel, place = divmod(channel, size)
        at = (panel, depth, place) if dtype == torch.float32 else (panel, depth // 2, place, depth % 2)
        assert packed[at] == weight[channel, depth]
    assert packed.shape[0] == 2 and packed.numel() == 2 * size * 6


@needs_kernel
def test_vectors_of_avx2_do_the_same() -> None:
    if lanes() == 8:
        pytest.skip("this processor's vectors are those of AVX2, which the other tests have used")
    chosen = "logits_equal or bits_depend or taken_back or alone_together or filters_choose"
    chosen = f"({chosen}) and not bf16"  # which a processor of AVX2 alone has no instructions for
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    environment = {**os.environ, compiled.SWITCH: "avx2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout, done.stdout


def test_the_kernel_is_compiled_once(tmp_path: Path) -> None:
    if LIBRARY is None:
        pytest.skip("the decoder's kernel can't be compiled here")
    library = compiled._compiled(SOURCE, tmp_path)
    before = library.stat().st_mtime_ns
    time.sleep(0.01)
    assert compiled._compiled(SOURCE, tmp_path) == library and library.stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == [library.name], "nothing is left lying about"


def test_a_damaged_kernel_is_compiled_again_and_a_stranger_s_is_never_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if LIBRARY is None:
        pytest.skip("the decoder's kernel can't be compiled here")
    built = compiled._compiled(SOURCE, tmp_path)
    built.write_bytes(b"no library")
    assert compiled._loaded(SOURCE, tmp_path, compiled.FLAGS).lanes() == lanes()
    built.chmod(0o777)
    with pytest.raises(PermissionError, match="can be written by everybody"):
        compiled._loaded(SOURCE, tmp_path, compiled.FLAGS)
    built.chmod(0o755)
    monkeypatch.setattr(compiled.os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="belongs to somebody else"):
        compiled._loaded(SOURCE, tmp_path, compiled.FLAGS)


@needs_kernel
@torch.no_grad()
def test_pytorch_s_default_type_is_nothing_to_the_kernel() -> None:
    dalle, text, images = _dalle(), some_captions(STREAM), _images()

    def logits() -> Tensor:
        engine = Engine(dalle, torch.float32, is_native=True)
        _, cache = engine.prefill(text)
        return engine.extend(images[:, :3], cache)

    expected = logits()
    for kind in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(kind)
        try:
            assert torch.equal(logits(), expected)
        finally:
            torch.set_default_dtype(torch.float32)


@needs_kernel
@torch.no_grad()
def test_rows_that_the_cache_lacks_are_refused() -> None:
    dalle, text, images = _dalle(), some_captions(STREAM), _images()
    engine = Engine(dalle, torch.float32, is_native=True)
    _, cache = engine.prefill(text[:1])
    with pytest.raises(ValueError, match="a cache of 1 rows"):
        engine.extend(images[:2, :1], cache)


def _kernel_in(environment: dict[str, str]) -> tuple[str, str]:
    """What a fresh process under this environment says of the kernel, and what it logs."""
    code = (
        "import logging; logging.basicConfig(level=20); "
        "from dalle_mini_impl.native.kernel import kernel; print(kernel())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


def test_without_a_compiler_or_room_or_wish_there_is_no_kernel_and_one_line_says_why(tmp_path: Path) -> None:
    if sys.platform != "linux" or b"avx2" not in compiled._processor().split():
        pytest.skip("only compiled on Linux, for AVX2")
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "decode.cpp: no such processor" >&2\nexit 1\n')
    broken.chmod(0o755)
    file = tmp_path / "file"
    file.write_text("")
    for environment, reason in (
        ({"CXX": "no-such-compiler -m64"}, "no C++ compiler (no-such-compiler) found"),
        ({"CXX": str(broken), "XDG_CACHE_HOME": str(tmp_path / "cache")}, "no such processor"),
    ):
        found, said = _kernel_in(environment)
        assert found == "None" and reason in said, environment
    for environment in ({"XDG_CACHE_HOME": str(file)}, {"CXX": "env g++", "XDG_CACHE_HOME": str(tmp_path / "new")}):
        found, said = _kernel_in(environment)
        assert (found == "None") == (LIBRARY is None), f"{environment}: {said}"
    found, said = _kernel_in({compiled.SWITCH: "0"})
    assert (found, said) == ("None", "")


def test_a_processor_with_shorter_vectors_is_left_to_pytorch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled.sys, "platform", "linux")
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    monkeypatch.setattr(compiled, "_processor", lambda: b"flags : sse2 avx fma")
    monkeypatch.setattr(compiled, "_compiled", lambda *_: pytest.fail("compiled for nothing"))
    with caplog.at_level("INFO", "dalle_mini_impl"):
        assert compiled.library.__wrapped__(SOURCE, "decoding") is None
    assert "made for processors with AVX2" in caplog.text


def test_an_engine_without_the_kernel_draws_on(monkeypatch: pytest.MonkeyPatch) -> None:
    dalle, text, images = _dalle(), some_captions(STREAM), _images()
    monkeypatch.setattr(trunk, "kernel", lambda: None)
    engine = Engine(dalle)
    assert engine._native is None
    with torch.no_grad():
        logits = engine.extend(images[:, :-1], engine.prefill(text)[1])
        assert torch.allclose(logits, dalle(text, images)[1][:, 1:], atol=1e-5)
    monkeypatch.setattr(trunk, "kernel", lambda: SimpleNamespace(has_brief=lambda: 0, lanes=lambda: 16))
    assert can_run(dalle.config, CPU, torch.float32) and not can_run(dalle.config, CPU, torch.bfloat16)
