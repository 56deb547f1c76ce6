"""Attention document by document: its backward against autograd through a softmax in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from accessory.model import document_attention
from accessory.model.document_attention import attend_by_document

WIDTH = 16


def leaves(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random q, k and v."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(tokens, n, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def written_out(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    """A softmax over one matrix of scores of all documents, in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (document[:, None] == document) & (distance >= 0) & (distance < (window or len(q)))
    scores = torch.einsum("ihe,jhe->hij", q, k) / math.sqrt(WIDTH)
    return torch.einsum("hij,jhe->ihe", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def both(dtype: torch.dtype, lengths: tuple[int, ...], window: int | None, heads: int = 6, kv_heads: int = 2):
    """Value and gradients, ours and the softmax's."""
    given = leaves(sum(lengths), heads, kv_heads, dtype)
    wide = [t.detach().double().requires_grad_() for t in given]
    found, wanted = attend_by_document(*given, lengths, window), written_out(*wide, lengths, window)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad(found, given, weights.to(dtype))
    theirs = torch.autograd.grad(wanted, wide, weights)
    return (found, *ours), (wanted, *theirs)


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 12, 40])
@pytest.mark.parametrize("block", [1, 5, 1000])
def test_equals_softmax_in_float64(monkeypatch, heads: tuple[int, int], window: int | None, block: int) -> None:
    """Whatever the window and however many rows the backward takes at a time."""
    monkeypatch.setattr(document_attention, "_BLOCK_SCORES", 0)
    monkeypatch.setattr(document_attention, "_FEWEST_ROWS", block)
    monkeypatch.setattr(document_attention, "_PIECE", 4)
    for found, wanted in zip(*both(torch.float64, (12, 1, 30, 2), window, *heads), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("window", [None, 50])
def test_bf16_is_close_to_float64(window: int | None) -> None:
    """Documents longer than a block: within 1 % of the norm."""
    for found, wanted in zip(*both(torch.bfloat16, (130, 17, 64), window), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - wanted).norm() < 0.01 * wanted.norm()


def test_gradient_is_the_functions() -> None:
    """Finite differences."""
    given = leaves(7, 2, 1)
    assert torch.autograd.gradcheck(lambda *t: attend_by_document(*t, (5, 2), 3), given, fast_mode=True)


def test_keys_that_are_hidden_do_not_overflow() -> None:
    """A later key with a score far above the row's sum: its power is infinite before it is cleared."""
    q, k, v = (t.detach() for t in leaves(3, 1, 1))
    k[2] *= 1e5
    given = [t.requires_grad_() for t in (q, k, v)]
    gradients = torch.autograd.grad(attend_by_document(*given, (3,)).sum(), given)
    assert all(t.isfinite().all() for t in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5])
def test_forward_of_other_devices_equals_the_cpus(monkeypatch, dtype: torch.dtype, window: int | None) -> None:
    """Results and log-sums, all scores at once and by the flash kernel; with the masks of later pieces too."""
    q, k, v = (t.detach().to(dtype) for t in leaves(12, 6, 2))
    at, seen = slice(6, 10), slice(0 if window is None else 2, 10)
    mask = None if window is None else document_attention._band(at, seen, 4, window, q)
    parts = (q, k, v) if window is None else (q[at], k[seen], v[seen])
    ours, flash = (f(*parts, mask, 0.3) for f in (document_attention._softmax, document_attention._flash))
    for one, other in zip(ours, flash, strict=True):
        assert (one.double() - other.double()).norm() < (1e-6 if dtype == torch.float32 else 0.01) * other.norm()


def test_keeps_no_scores() -> None:
    """q, k, v, the result, and a number a query and head."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        attend_by_document(*leaves(20, 4, 2, torch.bfloat16), (20,))
    assert [(tuple(t.shape), t.dtype) for t in saved] == [
        ((20, 4, WIDTH), torch.bfloat16), ((20, 2, WIDTH), torch.bfloat16), ((20, 2, WIDTH), torch.bfloat16),
        ((20, 4, WIDTH), torch.bfloat16), ((20, 4), torch.float32),
    ]  # fmt: skip
