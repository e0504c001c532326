"""Settings of the machine that every command shares."""

from __future__ import annotations

import ctypes
import os
import sys

KERNELS_KEPT = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")  # the first one counts
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h


def prepare() -> None:
    """What every command asks of the machine before it works."""
    keep_freed_memory()
    limit_kept_kernels()


def limit_kept_kernels() -> None:
    """Tell oneDNN to keep 64 kernels instead of 1,024, before its first product of matrices; a user's own limit stays.

    It makes one for each shape, in some 0.3 ms, and batches have ever new lengths: six tasks of SmolLM2 had 170 MiB of
    kernels, most of them never used again. 64 are more than a step has; making the few again that come back took 10 ms
    in 8 steps and 120 answers.
    """
    if not any(name in os.environ for name in KERNELS_KEPT):
        os.environ[KERNELS_KEPT[0]] = "64"


def give_back_freed_memory() -> None:
    """Let the system have what is freed: gaps between small pieces that live on, into which nothing large fits."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


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
