"""What is said of a step that cannot be used; as the engine says it: tests/test_engine.py."""

from __future__ import annotations

import torch

from accessory.run.step_faults import is_out_of_memory


def test_memory_is_told_from_other_errors() -> None:
    full = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    assert all(map(is_out_of_memory, (torch.OutOfMemoryError("x"), MemoryError(), RuntimeError(full))))
    assert not any(map(is_out_of_memory, (RuntimeError("shape"), ValueError("memory"))))
