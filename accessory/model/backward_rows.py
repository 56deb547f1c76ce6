"""Which tokens the backward of a block's linears goes through. The others are only run forward.

Tokens without a label have no loss of their own; their gradient comes through the keys and values that later tokens
attend to. Near the head that part is small, and leaving it out saves a share of the backward's products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_ROWS: ContextVar[Tensor | None] = ContextVar("rows", default=None)


@contextmanager
def backward_only(rows: Tensor | None) -> Iterator[None]:
    """Linears that run inside this context have a gradient for the tokens `rows` [L], int64, only; None: for all."""
    token = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(token)


def backward_rows() -> Tensor | None:
    """The tokens that the backward goes through; None: all."""
    return _ROWS.get()
