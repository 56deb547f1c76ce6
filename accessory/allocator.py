"""How the C library hands out memory on a CPU: what a step freed serves the next, and is not faulted in again."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
_LARGEST_KEPT = 32 << 20  # bytes; in a heap, larger pieces leave holes that no other fits into


def keep_freed_memory() -> None:
    """Let every step find the memory of the step before; to be called before the first large allocation.

    Left alone, glibc gives the heap's end back to the system whenever it is free, and the next tensor pays for it again
    in page faults. Where the C library is another one, nothing is changed.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
