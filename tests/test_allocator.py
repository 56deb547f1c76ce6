"""Memory that a step frees serves the next one."""

from __future__ import annotations

PROBE = """
import resource, sys
import torch
from accessory.allocator import keep_freed_memory
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
