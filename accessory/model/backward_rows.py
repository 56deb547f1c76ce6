"""Which tokens the backward of a block's linears goes through. The others are only run forward.

Tokens without a label have no loss of their own; their gradient comes through the keys and values that later tokens
attend to. Near the head that part is small, and leaving it out saves a share of the backward's products. Then no
gradient but zero reaches these tokens' norms and gates either, so that nothing of them need be kept there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
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


def rows_to_keep(x: Tensor) -> Tensor | None:
    """The tokens of x [T, ...] that something is kept of for the backward; None: all, or there is no backward.

    All are kept where these are more than half: gradients of some that are spread over all take memory themselves.
    """
    rows = _ROWS.get() if torch.is_grad_enabled() else None
    return None if rows is None or 2 * len(rows) > len(x) else rows


def spread(gradient: Tensor, rows: Tensor, length: int) -> Tensor:
    """The gradient of all tokens [length, ...]: that of `rows` [L, ...], and zero."""
    return gradient.new_zeros(length, *gradient.shape[1:]).index_copy_(0, rows, gradient)


def backward_rows() -> Tensor | None:
    """The tokens that the backward goes through; None: all."""
    return _ROWS.get()
