"""Memory that runs out; as the engine says it: tests/test_engine.py, as an evaluation does: tests/run."""

from __future__ import annotations

import pytest
import torch

from accessory.errors import OutOfMemoryError
from accessory.memory.exhausted import is_out_of_memory, out_of_memory_as

FULL = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


def test_memory_is_told_from_other_errors() -> None:
    assert all(map(is_out_of_memory, (torch.OutOfMemoryError("x"), MemoryError(), RuntimeError(FULL))))
    assert not any(map(is_out_of_memory, (RuntimeError("shape"), ValueError("memory"))))


def test_it_is_said_in_words_of_the_place() -> None:
    """With its cause; other errors are not touched."""
    for full in (torch.OutOfMemoryError("x"), MemoryError(), RuntimeError(FULL)):
        with (
            pytest.raises(OutOfMemoryError, match=r"^too many answers$") as caught,
            out_of_memory_as(lambda: "too many answers"),
        ):
            raise full
        assert caught.value.__cause__ is full
    with pytest.raises(RuntimeError, match=r"^shape$"), out_of_memory_as(lambda: "too many answers"):
        raise RuntimeError("shape")
