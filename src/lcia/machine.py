"""Settings of the machine that every command shares."""

from __future__ import annotations

import ctypes
import os
import sys

_TUNABLES = "GLIBC_TUNABLES"
_NO_SMALL_CACHES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
KERNELS_KEPT = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")  # the first one counts


def start_again_without_small_caches() -> None:
    """Replace this process by one of the same command in which glibc keeps no caches of small pieces; once.

    torch asks for memory at multiples of 64 bytes, and glibc cuts them out of larger pieces. What it cuts off would go
    to a thread's cache or a fast bin, where it never joins its neighbours again: the hole that a freed tensor leaves is
    then a little too small for the next one of the same size. A training step of SmolLM2 held an eighth more for it.
    glibc reads the setting when a process starts. A user's own setting stays.
    """
    if not has_glibc() or "tcache_count" in os.environ.get(_TUNABLES, ""):
        return
    before = os.environ.get(_TUNABLES)
    os.environ[_TUNABLES] = f"{before}:{_NO_SMALL_CACHES}" if before else _NO_SMALL_CACHES
    os.execv(sys.executable, sys.orig_argv)


def has_glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, OSError, ValueError):  # no such function, or another C library
        return False


def joins_freed_memory() -> bool:
    """Whether this process is one without caches of small pieces."""
    return has_glibc() and _NO_SMALL_CACHES in os.environ.get(_TUNABLES, "")


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
    if has_glibc():
        ctypes.CDLL(None).malloc_trim(0)
