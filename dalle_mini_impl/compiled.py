"""Compiles the package's C++ for the machine it runs on, once, and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger("dalle_mini_impl")

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
SWITCH = "DALLE_MINI_IMPL_NATIVE"
"""Environment variable; "0" does without compiled code, "avx2" without AVX-512 where the processor has that."""
_NEEDED = frozenset({b"avx2", b"fma"})
_TIMEOUT_SEC = 120


@cache
def library(source: Path, purpose: str) -> ctypes.CDLL | None:
    """A compiled source, or None where it isn't wanted or can't be had, which the log says once.

    purpose: what runs in PyTorch's operations otherwise. The processor must have AVX2 and FMA. Compiling takes Linux,
    g++ and a few seconds, the first time on a machine; $XDG_CACHE_HOME keeps what comes out.
    """
    wish = os.environ.get(SWITCH, "1")
    if wish == "0" or sys.platform != "linux":
        return None
    if not set(_processor().split()) >= _NEEDED:
        logger.info("%s runs in PyTorch's operations; its kernel is made for processors with AVX2", purpose)
        return None
    try:
        flags = (*FLAGS, "-mno-avx512f") if wish == "avx2" else FLAGS
        try:
            return _loaded(source, cache_folder(), flags)
        except FileNotFoundError:  # there is no compiler
            raise
        except (OSError, RuntimeError):  # no folder to keep it in
            with tempfile.TemporaryDirectory(prefix="dalle-mini-impl-") as folder:  # for this process alone
                return _loaded(source, Path(folder), flags)
    except (OSError, subprocess.SubprocessError) as error:
        why = _reason(error)
        logger.info("%s runs in PyTorch's operations, since its kernel can't be compiled here: %s", purpose, why)
        return None


def cache_folder() -> Path:
    """Where compiled code is kept: $XDG_CACHE_HOME/dalle-mini-impl, else in ~/.cache; RuntimeError without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle-mini-impl"


def _loaded(source: Path, folder: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library in a folder, compiled where it isn't there yet, or anew where what is there can't be loaded."""
    built = _compiled(source, folder, flags)
    try:
        return ctypes.CDLL(str(built))
    except OSError:
        built.unlink(missing_ok=True)
        return ctypes.CDLL(str(_compiled(source, folder, flags)))


def _compiled(source: Path, folder: Path, flags: tuple[str, ...] = FLAGS) -> Path:
    """The library for this source, compiler, processor and flags, compiled if it isn't there yet.

    Raises OSError or SubprocessError where there is no compiler, where it fails or nothing can be written.
    """
    compiler = shlex.split(os.environ.get("CXX") or "g++")  # CXX may be "ccache g++"
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"no C++ compiler ({compiler[0]}) found")
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=_TIMEOUT_SEC).stdout
    key = hashlib.sha256(b"\0".join([source.read_bytes(), " ".join(flags).encode(), version, _processor()]))
    built = folder / f"{source.stem}-{key.hexdigest()[:16]}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in (folder, built):
        _check_owner(place)
    if not built.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # beside it, so that moving it is one step
            part = Path(scratch) / built.name
            command = [*compiler, *flags, "-o", str(part), str(source)]
            subprocess.run(command, capture_output=True, check=True, timeout=_TIMEOUT_SEC)
            with part.open("rb+") as file:  # a library of which a power cut has left a half ends whoever loads it
                os.fsync(file.fileno())
            part.replace(built)
    return built


def _check_owner(place: Path) -> None:
    """Raises PermissionError for what somebody else could have put there: it is about to be run."""
    if not place.exists():
        return
    facts = place.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & stat.S_IWOTH:
        raise PermissionError(f"{place} belongs to somebody else, or can be written by everybody")


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
