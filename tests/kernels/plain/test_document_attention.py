"""Attention inside documents: result and gradients against a softmax over one matrix in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from accessory.kernels.documents import Documents
from accessory.kernels.plain import document_grid
from accessory.kernels.plain.document_attention import attend

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
    found, wanted = attend(*given, Documents.build(lengths), window), written_out(*wide, lengths, window)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad(found, given, weights.to(dtype))
    theirs = torch.autograd.grad(wanted, wide, weights)
    return (found, *ours), (wanted, *theirs)


@pytest.fixture
def small_blocks(monkeypatch):
    """Sets how many queries attend at once; below their documents' length they no longer share a group."""

    def set_rows(rows: int) -> None:
        monkeypatch.setattr(document_grid, "BLOCK_SCORES", 0)
        monkeypatch.setattr(document_grid, "FEWEST_ROWS", rows)
        document_grid.grid_of.cache_clear()

    yield set_rows
    document_grid.grid_of.cache_clear()


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 12, 40])
@pytest.mark.parametrize("rows", [1, 5, None])
def test_equals_softmax_in_float64(small_blocks, heads: tuple[int, int], window: int | None, rows: int | None) -> None:
    """Whatever the window, however many rows are taken at a time, and padded beside one another."""
    if rows:
        small_blocks(rows)
    for found, wanted in zip(*both(torch.float64, (12, 1, 30, 2, 13), window, *heads), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("rows", [1, 5, None])
def test_what_is_not_read_changes_nothing_else(small_blocks, window: int | None, rows: int | None) -> None:
    """First queries whose results nobody reads are keys all the same; of some documents all, of some none."""
    if rows:
        small_blocks(rows)
    lengths, skipped = (12, 11, 30, 29, 2, 13, 8), (4, 9, 20, 0, 2, 3, 8)
    read = torch.cat([torch.arange(n) >= first for n, first in zip(lengths, skipped, strict=True)])
    given = leaves(sum(lengths), 6, 2)
    found = attend(*given, Documents(lengths, skipped, torch.device("cpu"), None), window)[read]
    wanted = written_out(*given, lengths, window)[read]
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(found.shape, dtype=torch.float64)
    for ours, theirs in zip(*(torch.autograd.grad(out, given, weights) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("blocks", [False, True])
def test_bf16_is_close_to_float64(small_blocks, window: int | None, blocks: bool) -> None:
    """Within 1 % of the norm: documents side by side, and in blocks."""
    if blocks:
        small_blocks(50)
    for found, wanted in zip(*both(torch.bfloat16, (130, 17, 64), window), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - wanted).norm() < 0.01 * wanted.norm()


def test_gradient_is_the_functions() -> None:
    """Finite differences."""
    given = leaves(7, 2, 1)
    assert torch.autograd.gradcheck(lambda *t: attend(*t, Documents.build((5, 2)), 3), given, fast_mode=True)


def test_keys_that_are_hidden_do_not_overflow() -> None:
    """A later key with a score far above the row's sum: its power is infinite before it is cleared."""
    q, k, v = (t.detach() for t in leaves(3, 1, 1))
    k[2] *= 1e5
    given = [t.requires_grad_() for t in (q, k, v)]
    gradients = torch.autograd.grad(attend(*given, Documents.build((3,))).sum(), given)
    assert all(t.isfinite().all() for t in gradients)


def test_documents_do_not_touch_one_another() -> None:
    """What stands in a document's padding is finite for it, or not: it gets the bits that it gets beside others."""
    q, k, v = (t.detach() for t in leaves(8 + 5, 2, 1, torch.float32))
    spoiled = [t.clone() for t in (q, k, v)]
    for t in spoiled:
        t[:8] = torch.nan
    clean, beside = (attend(*given, Documents.build((8, 5))) for given in ((q, k, v), spoiled))
    assert torch.equal(clean[8:], beside[8:])
    assert beside[:8].isnan().all()


def test_keeps_no_scores() -> None:
    """q, k and v."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        attend(*leaves(20, 4, 2, torch.bfloat16), Documents.build((20,)))
    assert [(tuple(t.shape), t.dtype) for t in saved] == [
        ((20, heads, WIDTH), torch.bfloat16) for heads in (4, 2, 2)
    ]  # fmt: skip
