"""Memory that runs out; as the engine says it: tests/engine, as an evaluation does: tests/run."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from accessory.errors import OutOfMemoryError, is_out_of_memory
from accessory.memory.exhausted import out_of_memory_as

FULL = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
PINNED = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
TRITON = "Triton Error [CUDA]: out of memory"
NCCL = (
    "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL "
    "version 2.28.9\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
)
CALLOC = "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc async 608 bytes"
BROKEN = "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 700 'illegal memory access'"


def test_memory_is_told_from_other_errors() -> None:
    assert all(map(is_out_of_memory, (torch.OutOfMemoryError("x"), MemoryError())))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert all(is_out_of_memory(RuntimeError(said)) for said in (FULL, CUBLAS, PINNED, TRITON))
    assert is_out_of_memory(torch.AcceleratorError(PINNED))
    assert all(is_out_of_memory(dist.DistBackendError(said)) for said in (NCCL, CALLOC))
    assert not any(map(is_out_of_memory, (RuntimeError("shape"), ValueError("memory"), dist.DistBackendError(BROKEN))))


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
