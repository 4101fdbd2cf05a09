"""Files are whole or not there, and who can't write one says which."""

from __future__ import annotations

import errno
import json
import os
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dalle_mini_impl.files import naming, reserve, write_atomically, write_json

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "error", [FULL, RuntimeError("writer failed"), SafetensorError("I/O error (os error 28)")], ids=type
)
def test_a_full_disk_leaves_what_was_there_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"good": 1})

    def fail(part: Path) -> None:
        part.write_text("half of")
        raise error

    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(4096))
    with pytest.raises(OSError, match="No space left on device; what was there before is untouched") as raised:
        write_atomically(path, fail)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(path))
    assert json.loads(path.read_text()) == {"good": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_an_error_that_is_not_of_the_disk_keeps_its_words(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        raise RuntimeError("tensors share memory")

    with pytest.raises(OSError, match="tensors share memory"):
        write_atomically(tmp_path / "x", fail)


def test_errors_of_the_disk_are_named_and_others_left_alone(tmp_path: Path) -> None:
    def raise_(error: Exception) -> Callable[[], None]:
        def act() -> None:
            with naming(tmp_path / "mine"):
                raise error

        return act

    for error, name in (
        (FULL, str(tmp_path / "mine")),
        (OSError(errno.ENOSPC, "full", "theirs"), "theirs"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), None),
    ):
        with pytest.raises(OSError) as raised:
            raise_(error)()
        assert raised.value.filename == name


def test_space_is_taken_before_it_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    reserve(path)
    assert path.stat().st_size == 1 << 20
    if hasattr(os, "posix_fallocate"):
        assert path.stat().st_blocks * 512 >= 1 << 20
