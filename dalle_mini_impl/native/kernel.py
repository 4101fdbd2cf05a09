"""The decoder's kernel (`decode.cpp`), where this machine has one."""

from __future__ import annotations

import ctypes
from pathlib import Path

from dalle_mini_impl.compiled import library

SOURCE = Path(__file__).with_name("decode.cpp")


def kernel() -> ctypes.CDLL | None:
    """The compiled decoder, or None where it isn't wanted or can't be had; see `compiled.library`."""
    return library(SOURCE, "decoding")
