"""Has the C library keep the memory that a step has freed for the next one."""

from __future__ import annotations

import ctypes
import os
import platform

KEPT = 256 * 2**20
"""Bytes: freed memory at the end of the heap is kept up to this size, and larger blocks go back at once."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have glibc keep up to KEPT bytes of freed memory, for this process from here on; returns whether it does.

    By itself it returns most of what tensors occupied to the system, which hands it out again page by page, each of
    them zeroed. Other C libraries stay as they are, and so does glibc where its environment variables say something.
    """
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in _SET_BY_USER):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_TRIM_THRESHOLD, KEPT) and mallopt(_MMAP_THRESHOLD, KEPT))
