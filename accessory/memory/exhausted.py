"""Out-of-memory errors that name what was being computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accessory.errors import OutOfMemoryError, is_out_of_memory


@contextmanager
def out_of_memory_as(said: Callable[[], str]) -> Iterator[None]:
    """Inside this context, memory that runs out is an `OutOfMemoryError` with the words of `said`."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(said()) from error
