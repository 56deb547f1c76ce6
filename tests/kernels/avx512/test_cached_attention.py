"""Attention to a cache in C++: against float64, and what must not change a bit of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accessory.kernels.avx512.cached_attention import attend

COUNTS = (1, 16, 17, 40, 33)
LONGEST = 40


def operands(heads: int, kv_heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, and keys and values of which those that no document has are not finite."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(COUNTS), heads, width, generator=generator).bfloat16()
    keys, values = (
        torch.randn(len(COUNTS), LONGEST, kv_heads, width, generator=generator).bfloat16() for _ in range(2)
    )
    for i, count in enumerate(COUNTS):
        keys[i, count:], values[i, count:] = torch.nan, torch.inf
    return q, keys, values


def exact(q: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float) -> Tensor:
    """A softmax for each document and head, in float64."""
    out, group = torch.empty(q.shape, dtype=torch.float64), q.shape[1] // keys.shape[2]
    for i, count in enumerate(COUNTS):
        seen = slice(max(count - (window or count), 0), count)
        for head in range(q.shape[1]):
            k, v = (t[i, seen, head // group].double() for t in (keys, values))
            out[i, head] = (scale * k @ q[i, head].double()).softmax(0) @ v
    return out


@pytest.mark.parametrize("window", [None, 1, 15, 16, 30, 100])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("width", [1, 16, 64, 72, 136])
def test_equals_float64(width: int, heads: tuple[int, int], window: int | None) -> None:
    """Rounded once: whole and odd widths and numbers of keys, more of them than a window or fewer."""
    given = operands(*heads, width)
    found = attend(*given, COUNTS, window, 0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact(*given, window, 0.3), rtol=1.01 * 2**-8, atol=1e-4)


def test_large_scores_do_not_overflow() -> None:
    """Scores of some thousands, of which the highest has all the weight."""
    q, keys = torch.full((1, 1, 2), 64.0), torch.tensor([[[[32.0, 32.0]], [[28.0, 32.0]]]])
    values = torch.tensor([[[[3.0, 3.0]], [[0.0, 0.0]]]])
    found = attend(*(t.bfloat16() for t in (q, keys, values)), (2,), None, 1.0)
    assert torch.equal(found.float(), torch.full((1, 1, 2), 3.0))


@pytest.mark.usefixtures("threads")
def test_threads_change_nothing() -> None:
    """Not a bit: a head is one thread's."""
    given = operands(6, 3, 64)
    found = attend(*given, COUNTS, None, 0.125)
    torch.set_num_threads(1)
    assert torch.equal(found, attend(*given, COUNTS, None, 0.125))


def test_other_documents_change_nothing() -> None:
    """Not a bit."""
    q, keys, values = operands(6, 2, 64)
    together = attend(q, keys, values, COUNTS, None, 0.125)
    for i, count in enumerate(COUNTS):
        one = slice(i, i + 1)
        alone = attend(q[one], keys[one, :count], values[one, :count], (count,), None, 0.125)
        assert torch.equal(together[one], alone)


def test_tensors_of_any_strides() -> None:
    """A part of the heads of a wider projection."""
    q, keys, values = operands(12, 4, 32)
    given = q[:, ::2], keys[:, :, 1:3], values[:, :, ::2]
    found = attend(*given, COUNTS, None, 0.2)
    assert torch.equal(found, attend(*(t.contiguous() for t in given), COUNTS, None, 0.2))
