"""Whether a decoder is decoding. Its caller says so, because running without gradients may be part of training.

While decoding, a call costs more than its arithmetic: autograd functions are skipped, and kernels for few rows used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_DECODING = ContextVar("decoding", default=False)


@contextmanager
def decoding() -> Iterator[None]:
    """Inside this context decoders decode: no gradient of what they compute is needed."""
    token = _DECODING.set(True)
    try:
        yield
    finally:
        _DECODING.reset(token)


def decodes() -> bool:
    """Whether the caller is inside `decoding()`."""
    return _DECODING.get()
