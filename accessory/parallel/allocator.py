"""What memory a process on a CPU keeps: what a step freed, for the next one, and compiled products of recent shapes."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
_LARGEST_KEPT = 32 << 20  # bytes; in a heap, larger pieces leave holes that no other fits into
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's, and PyTorch's layer over it
_NO_CACHES = "glibc.malloc.tcache_count=0"
_PRODUCTS_KEPT = 16  # one for each shape and dtype; more would lie scattered over the heap and keep it from shrinking


def keep_freed_memory() -> None:
    """Let every step find the memory of the step before; to be called before the first large allocation.

    Left alone, glibc gives the heap's end back to the system whenever it is free, and the next tensor pays for it again
    in page faults. Where the C library is another one, nothing is changed.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def start_without_thread_caches() -> None:
    """Start this process anew, once, with glibc's caches of small pieces off; to be called before any slow import.

    Pieces that a cache holds lie scattered between the tensors of the step that freed them, and each step finds other
    holes: the heap would spread for hours. glibc reads the setting only as a process starts. A user's own stays.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "tcache_count" not in tunables and hasattr(ctypes.CDLL(None), "mallopt"):
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:{_NO_CACHES}".lstrip(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def give_back_freed_memory() -> None:
    """Give the free pages of all threads' heaps back to the system: a thread that idles keeps none; takes some ms."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


def forget_old_shapes() -> None:
    """Let oneDNN keep about as many compiled products as a block needs; to be called before the first product.

    By default it and PyTorch keep 1,024 each, of a third of a MB. Since every micro-batch has another number of tokens,
    memory would grow for hours. A variable that the user has set stays as it is.
    """
    for variable in _CACHES:
        os.environ.setdefault(variable, str(_PRODUCTS_KEPT))
