"""Memory that runs out, on a GPU or on the CPU, told from other errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from accessory.errors import OutOfMemoryError


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; the CPU's allocator has no error of its own for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def out_of_memory_as(said: Callable[[], str]) -> Iterator[None]:
    """Inside this context, memory that runs out is an `OutOfMemoryError` with the words of `said`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(said()) from error
