"""Work is cut into chunks that fit the memory, and each picture counts once."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from dalle_mini_impl.out_of_memory import FittingChunks, explained

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:94] . DefaultCPUAllocator: not enough memory: you tried to"),
]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("most", [1, 2, 3, 8, 20])
def test_each_picture_comes_once_and_in_order_whatever_fits(error: RuntimeError, most: int) -> None:
    def work(chunk: np.ndarray) -> list[int]:
        if len(chunk) > most:
            raise error
        return chunk.tolist()

    chunks = FittingChunks(8)
    parts = list(chunks.map(work, np.arange(100, 119)))
    assert [picture for part in parts for picture in part] == list(range(100, 119)) and max(map(len, parts)) <= most
    assert chunks.size == {1: 1, 2: 2, 3: 2, 8: 8, 20: 8}[most]
    assert list(chunks.map(work, np.arange(0))) == []


def test_a_last_chunk_that_is_short_is_halved_itself() -> None:
    tried = []

    def work(chunk: np.ndarray) -> int:
        tried.append(len(chunk))
        if len(chunk) > 2:
            raise ERRORS[0]
        return len(chunk)

    assert list(FittingChunks(64).map(work, np.arange(5))) == [2, 2, 1]
    assert tried == [5, 2, 2, 1]


def test_a_failed_chunk_is_freed_before_the_next_try() -> None:
    left: list[weakref.ref[torch.Tensor]] = []

    def work(chunk: np.ndarray) -> int:
        gc.disable()
        assert all(tensor() is None for tensor in left)
        big = torch.zeros(len(chunk))
        left.append(weakref.ref(big))
        if len(chunk) > 1:
            raise RuntimeError(str(ERRORS[1]))
        return len(big)

    try:
        assert list(FittingChunks(4).map(work, np.arange(4))) == [1, 1, 1, 1]
    finally:
        gc.enable()


def test_one_picture_that_is_too_much_and_other_errors_come_through() -> None:
    def work(_: np.ndarray) -> None:
        raise error

    for error in (ERRORS[1], RuntimeError("shapes don't match")):
        with pytest.raises(RuntimeError) as raised:
            list(FittingChunks(1 if error is ERRORS[1] else 8).map(work, np.arange(3)))
        assert raised.value is error


def test_an_explained_error_says_what_was_too_much_why_and_what_helps() -> None:
    expected = r"^vae: evaluating is too much for the memory \(CUDA out of memory\. Tried.*GiB\); buy some$"
    with pytest.raises(MemoryError, match=expected), explained("vae: evaluating", "buy some"):
        raise torch.OutOfMemoryError(f"{ERRORS[0]}\nand where it went")
    with pytest.raises(RuntimeError, match="shapes"), explained("vae: evaluating", "buy some"):
        raise RuntimeError("shapes don't match")
