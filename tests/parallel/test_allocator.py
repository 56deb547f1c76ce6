"""Memory that a step frees serves the next one, and no step's shapes are remembered for ever."""

from __future__ import annotations

import json

import pytest
import torch

PROBE = """
import resource, sys
import torch
from accessory.parallel.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step = lambda: [torch.empty(6 << 20, dtype=torch.uint8).zero_() for _ in range(10)]
step()
before = faults()
for _ in range(4):
    step()
print(faults() - before)
"""


def test_freed_memory_is_not_faulted_in_again(python) -> None:
    """60 MiB made four times over: fewer page faults than one time has pages; left alone, several times as many."""
    kept, left = (int(python("-c", PROBE, how).stdout) for how in ("kept", "left"))
    assert kept < 60 << 8 < left


CACHED = """
import ctypes, json, os, sys
from accessory.parallel.allocator import start_without_thread_caches

if sys.argv[1] == "without":
    start_without_thread_caches()

class Info(ctypes.Structure):  # of malloc.h: struct mallinfo2
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes, libc.mallinfo2.restype = ctypes.c_void_p, [ctypes.c_void_p], Info
used = lambda: libc.mallinfo2().uordblks
before = used()
for piece in [libc.malloc(size) for size in range(600, 1000, 16) for _ in range(7)]:
    libc.free(piece)
print(json.dumps([used() - before, sys.argv[1:], sys.flags.dev_mode, os.environ.get("GLIBC_TUNABLES")]))
"""


def test_started_anew_without_caches_of_small_pieces(python) -> None:
    """140 kB that were freed count as in use as long as a thread caches them. Arguments, flags and tunables stay."""
    own = "glibc.malloc.arena_max=3"
    run = lambda how: json.loads(python("-X", "dev", "-c", CACHED, how, "--x", "a b", GLIBC_TUNABLES=own).stdout)  # noqa: E731
    cached, arguments, *same = run("left")
    kept, again, development, tunables = run("without")
    assert kept < 20_000 < 100_000 < cached
    assert [again[1:], development] == [arguments[1:], same[0]] == [["--x", "a b"], True]
    assert (same[1], tunables) == (own, f"{own}:glibc.malloc.tcache_count=0")


PRODUCTS = """
import ctypes, os, sys
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # of tests in the process that starts this one
    os.environ.pop(name, None)
import torch
from accessory.parallel.allocator import forget_old_shapes

class Info(ctypes.Structure):  # of malloc.h: struct mallinfo2
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info
if sys.argv[1] == "forgotten":
    forget_old_shapes()
weight = torch.ones(256, 256, dtype=torch.bfloat16)
step = lambda tokens: torch.ones(tokens, 256, dtype=torch.bfloat16) @ weight
[step(tokens) for tokens in range(100, 140)]
before = mallinfo2().uordblks
[step(tokens) for tokens in range(140, 1000)]
print(mallinfo2().uordblks - before)
"""


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 on this CPU")
def test_products_of_old_shapes_are_forgotten(python) -> None:
    """What 860 shapes more leave in use: next to nothing; left alone, half a MB each."""
    forgotten, left = (int(python("-c", PRODUCTS, how).stdout) for how in ("forgotten", "left"))
    assert forgotten < 5 << 20 < 100 << 20 < left
