"""How the process handles memory that tensors give back."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # names of glibc's mallopt parameters


_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2 * 2**20
_HUGE_BYTES = 2**31


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
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 * 2**20}  # -1: never
    is_set = all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings.items())
    if is_set:
        _ask_for_huge_pages()
    return is_set


def _ask_for_huge_pages() -> None:
    """Lets the kernel back the next gibibytes of the heap by pages of 2 MiB, where it does so for those who ask.

    The range is only reserved here and taken from memory when it is used. Fewer page faults and address look-ups
    save 4 % of a small transformer's training step. Kernels that can't go on as before.
    """
    library = ctypes.CDLL(None, use_errno=True)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = library.malloc(_HUGE_BYTES)
    if block:
        start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        library.madvise(start, (block + _HUGE_BYTES - start) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
        library.free(block)
