"""Whether a decoder is asked for next tokens: said by whoever asks it, since running without gradients may be training.

Of a token or a few, a call costs more than its arithmetic: autograd functions are left out, and kernels for few rows
are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_DECODING = ContextVar("decoding", default=False)


@contextmanager
def decoding() -> Iterator[None]:
    """While it is entered, no gradient is wanted of what is computed."""
    token = _DECODING.set(True)
    try:
        yield
    finally:
        _DECODING.reset(token)


def decodes() -> bool:
    """Whether it is entered now."""
    return _DECODING.get()
