"""Settings of the CPU's allocator and of oneDNN's caches, so that memory is reused by the next step and stays flat."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
_LARGEST_KEPT = 32 << 20  # bytes; larger tensors would leave holes in the heap that fit no other, so they are mapped
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's, and PyTorch's layer over it
_NO_CACHES = "glibc.malloc.tcache_count=0"
_PRODUCTS_KEPT = 16  # one for each shape and dtype; more would be scattered over the heap and keep it from shrinking


def keep_freed_memory() -> None:
    """Keep freed memory in the process, for the next step; to be called before the first large allocation.

    By default glibc returns the free end of the heap to the system, and the next tensor pays for it again in page
    faults. With another C library nothing changes.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def start_without_thread_caches() -> None:
    """Restart this process once with glibc's caches of small chunks (tcache) off; to be called before slow imports.

    Cached chunks stay scattered between freed tensors and fragment the heap, which would grow for hours. glibc reads
    the setting only at the start of a process. A setting of the user's is kept.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "tcache_count" not in tunables and hasattr(ctypes.CDLL(None), "mallopt"):
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:{_NO_CACHES}".lstrip(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def give_back_freed_memory() -> None:
    """Return the free pages of all threads' heaps to the system, idle threads' too; takes some milliseconds."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


def forget_old_shapes() -> None:
    """Let oneDNN cache only about as many compiled products as a block needs; to be called before the first one.

    By default it and PyTorch cache 1,024 each, a third of a MB apiece. Every micro-batch has another number of tokens,
    so memory would grow for hours. A variable that the user has set is kept.
    """
    for variable in _CACHES:
        os.environ.setdefault(variable, str(_PRODUCTS_KEPT))
