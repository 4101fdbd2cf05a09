"""How the process handles memory that tensors give back."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # names of glibc's mallopt parameters


def keep_freed_memory() -> bool:
    """Lets the C library keep freed memory for the next tensor; True where it could be asked to (glibc).

    By default glibc hands every large block back to the system at once, and each new tensor is paged in, zeroed, page
    by page: 33,000 page faults and 28 % of the time of a small transformer's training step. For programs that train
    or draw, at their start; the process then never shrinks below its peak. Nothing else changes.
    """
    if platform.system() != "Linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 * 2**20}
    return all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings.items())
