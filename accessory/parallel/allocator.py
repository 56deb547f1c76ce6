"""What memory a process on a CPU keeps: what a step freed, for the next one, and compiled products of recent shapes."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # parameters of glibc's mallopt
_LARGEST_KEPT = 32 << 20  # bytes; in a heap, larger pieces leave holes that no other fits into
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's, and PyTorch's layer over it
_PRODUCTS_KEPT = 16  # one for each shape and dtype; more would lie scattered over the heap and keep it from shrinking


def keep_freed_memory() -> None:
    """Let every step find the memory of the step before; to be called before the first large allocation.

    Left alone, glibc gives the heap's end back to the system whenever it is free, and the next tensor pays for it again
    in page faults. Where the C library is another one, nothing is changed.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def share_one_heap() -> None:
    """Let threads that take turns at the same work use one heap of glibc; each would spread a heap of its own."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_ARENA_MAX, 1)


def forget_old_shapes() -> None:
    """Let oneDNN keep about as many compiled products as a block needs; to be called before the first product.

    By default it and PyTorch keep 1,024 each, of a third of a MB. Since every micro-batch has another number of tokens,
    memory would grow for hours. A variable that the user has set stays as it is.
    """
    for variable in _CACHES:
        os.environ.setdefault(variable, str(_PRODUCTS_KEPT))
