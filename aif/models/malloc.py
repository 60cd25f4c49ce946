"""What glibc does with memory that is freed: kept while a stage runs, given back after it."""

from __future__ import annotations

import ctypes
import gc

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Have glibc reuse large blocks rather than give them back to the kernel when they are freed.

    A step on a CPU takes and frees gigabytes of tensors; each block that comes anew is mapped and
    zeroed page by page, which was a fifth to a quarter of all time. The process keeps its peak,
    until `give_back_memory`.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
    except (OSError, AttributeError):
        return  # another libc, with ways of its own


def give_back_memory() -> None:
    """Free what nothing refers to any more and give it back to the kernel, so that one stage's
    peak does not come on top of the next one's."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return
