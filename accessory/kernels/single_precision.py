"""Products of fp32 matrices on a CPU by oneDNN, for callers that may differ from training in the last digits.

PyTorch has MKL compute them, which on AMD's CPUs runs at half the pace: 100 GFLOP/s a core of an EPYC of 2024, where
oneDNN has 200. Training keeps to MKL, so that a run gives the same numbers as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
from torch import Tensor

_BY_ONEDNN = ContextVar("by_onednn", default=False)


@contextmanager
def by_onednn() -> Iterator[None]:
    """Inside this context `product` may use oneDNN. No gradient of what is computed is needed."""
    token = _BY_ONEDNN.set(True)
    try:
        yield
    finally:
        _BY_ONEDNN.reset(token)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [T, K] times b [K, N] -> [T, N], in their dtype. out: where it may be put, rather than into new memory."""
    if _BY_ONEDNN.get() and _there() and _suits(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return a @ b if out is None else torch.mm(a, b, out=out)


def _suits(a: Tensor, b: Tensor) -> bool:
    return a.is_cpu and a.dtype == b.dtype == torch.float32 and b.t().is_contiguous() and not a.requires_grad


@lru_cache
def _there() -> bool:
    """Whether this PyTorch has oneDNN, and the operation by which its compiler calls it."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
