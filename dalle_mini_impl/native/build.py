"""Compiles the decoder's kernel for the machine it runs on, once, and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger("dalle_mini_impl")

SOURCE = Path(__file__).with_name("decode.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
SWITCH = "DALLE_MINI_IMPL_NATIVE"
"""Environment variable; "0" does without compiled code, "avx2" without AVX-512 where the processor has that."""
_NEEDED = {b"avx2", b"fma"}
_TIMEOUT_SEC = 120


@cache
def kernel() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it isn't wanted or can't be had: no Linux, AVX2, g++ or room to write.

    Compiling takes a few seconds, the first time on a machine; what comes out is kept in $XDG_CACHE_HOME.
    """
    wish = os.environ.get(SWITCH, "1")
    if wish == "0" or sys.platform != "linux":
        return None
    if not set(_processor().split()) >= _NEEDED:
        logger.info("decoding runs in PyTorch's operations, since its kernel is made for processors with AVX2")
        return None
    try:
        return ctypes.CDLL(str(_compiled(cache_folder(), (*FLAGS, "-mno-avx512f") if wish == "avx2" else FLAGS)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info(
            "decoding runs in PyTorch's operations, since its kernel can't be compiled here: %s", _reason(error)
        )
        return None


def cache_folder() -> Path:
    """Where compiled code is kept: $XDG_CACHE_HOME/dalle-mini-impl, ~/.cache without it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle-mini-impl"


def _compiled(folder: Path, flags: tuple[str, ...] = FLAGS) -> Path:
    """The library for this source, compiler, processor and flags, compiled if it isn't there yet.

    Raises OSError or SubprocessError where there is no compiler, where it fails or nothing can be written.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (g++) found")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_TIMEOUT_SEC).stdout
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), " ".join(flags).encode(), version, _processor()]))
    library = folder / f"decode-{key.hexdigest()[:16]}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # beside it, so that moving it is one step
            part = Path(scratch) / library.name
            command = [compiler, *flags, "-o", str(part), str(SOURCE)]
            subprocess.run(command, capture_output=True, check=True, timeout=_TIMEOUT_SEC)
            part.replace(library)
    return library


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"model name", b"Features"))}))


def _reason(error: Exception) -> str:
    """One line of it: the compiler's first words where it has said any."""
    said = getattr(error, "stderr", None)
    text = said.decode(errors="replace") if said else str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
