"""Settings of the machine that every command shares."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks for the next allocation instead of giving them back to the system.

    A training step on a CPU allocates and frees the same large tensors again and again; without this, each of them
    is mapped and zeroed by the kernel anew. Returns whether the setting was taken (False on other C libraries).
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return False
    largest_mmap_threshold = 32 * 2**20  # glibc refuses more
    return bool(mallopt(_M_MMAP_THRESHOLD, largest_mmap_threshold) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
