"""glibc keeps freed memory while a stage runs, and gives it back to the kernel after it."""

from __future__ import annotations

import ctypes
import gc

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Make glibc reuse freed large blocks instead of giving them back to the kernel.

    A step on a CPU allocates and frees gigabytes of tensors. Mapping and zeroing new blocks was a
    fifth to a quarter of all time. The process keeps its peak until `give_back_memory`.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
    except (OSError, AttributeError):
        return  # another libc


def give_back_memory() -> None:
    """Collect garbage and give freed memory back to the kernel, so that two stages' peaks do not
    add up."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return
