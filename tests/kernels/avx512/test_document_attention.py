"""Attention in C++: against float64, beside its plain twin, and what must not change a bit of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from accessory.kernels.avx512.document_attention import backward, forward, takes, workspace_bytes
from accessory.kernels.documents import Documents

LENGTHS = (130, 1, 17, 64, 33, 0, 32, 100)


def operands(tokens: int, heads: int, kv_heads: int, width: int) -> list[Tensor]:
    """Random q, k, v and the result's gradient."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, n, width, generator=generator).bfloat16() for n in (heads, kv_heads, kv_heads, heads)]


def ours(given: list[Tensor], documents: Documents, window: int | None = None) -> list[Tensor]:
    """Value and gradients."""
    q, k, v, dout = given
    scale = 1 / math.sqrt(q.shape[-1])
    return [forward(q, k, v, documents, window, scale), *backward(q, k, v, dout, documents, window, scale)]


def exact(given: list[Tensor], lengths: tuple[int, ...], window: int | None) -> list[Tensor]:
    """The same of a softmax over one matrix of all documents, in float64."""
    q, k, v = leaves = [t.double().requires_grad_() for t in given[:3]]
    groups = q.shape[1] // k.shape[1]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (document[:, None] == document) & (distance >= 0) & (distance < (window or len(q)))
    scores = torch.einsum("ihe,jhe->hij", q, k.repeat_interleave(groups, 1)) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out = torch.einsum("hij,jhe->ihe", weights, v.repeat_interleave(groups, 1))
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3].double())]


@pytest.mark.parametrize("window", [None, 1, 3, 31, 32, 33, 70])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("width", [2, 16, 64, 66, 80, 128])
def test_equals_float64(width: int, heads: tuple[int, int], window: int | None) -> None:
    """Within bf16's rounding of the norm: single and whole blocks, odd ends, none at all, any width that is even."""
    given = operands(sum(LENGTHS), *heads, width)
    found = ours(given, Documents.build(LENGTHS), window)
    for one, wanted in zip(found, exact(given, LENGTHS, window), strict=True):
        assert one.dtype == torch.bfloat16
        assert one.shape == wanted.shape
        assert (one.double() - wanted).norm() <= 4e-3 * wanted.norm()


def test_scores_are_not_rounded() -> None:
    """Weights of keys whose scores of some 30 differ by a hundredth: in bf16 those would be equal."""
    q, k = torch.full((2, 1, 2), 4.0), torch.tensor([[[8.0, 2.0]], [[8.0, 2.015625]]])
    v = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    out = forward(*(t.bfloat16() for t in (q, k, v)), Documents.build((2,)), None, 1.0)
    wanted = torch.softmax(torch.tensor([0.0, 0.0625]), 0)
    torch.testing.assert_close(out[1, 0].float(), wanted, rtol=2**-7, atol=0)


def test_threads_change_nothing(threads: int) -> None:
    """Not a bit: a document is one thread's."""
    given, documents = operands(sum(LENGTHS), 6, 2, 64), Documents.build(LENGTHS)
    found = ours(given, documents)
    torch.set_num_threads(1)
    assert all(map(torch.equal, found, ours(given, documents)))
    assert workspace_bytes(130, 64, backward=True) * threads < 1 << 21


def test_other_documents_change_nothing() -> None:
    """Not a bit, even where they are not finite."""
    given = operands(300, 4, 2, 32)
    alone = [t[100:200] for t in given]
    for t in given:
        t[:100], t[200:] = torch.nan, torch.inf
    found = ours(given, Documents.build((100, 100, 100)))
    for one, other in zip(found, ours(alone, Documents.build((100,))), strict=True):
        assert torch.equal(one[100:200], other)
        assert not one[:100].isfinite().any()


def test_documents_that_begin_alike() -> None:
    """Packed once, against laid out whole: the same bits, and gradients of keys for each place."""
    lengths, shared = (70, 90, 40), (0, 50, 33)
    order = torch.cat(
        [torch.arange(70), torch.arange(50), torch.arange(70, 110), torch.arange(33), torch.arange(110, 117)]
    )
    packed = operands(sum(lengths) - sum(shared), 6, 2, 64)
    whole = [t[order] for t in packed]
    new = torch.cat([torch.arange(n) >= known for n, known in zip(lengths, shared, strict=True)])
    whole[3][~new] = 0  # what is read of a token is read where it is packed
    out, dq, dk, dv = ours(packed, Documents.build(lengths, shared))
    wanted = ours(whole, Documents.build(lengths))
    assert torch.equal(out, wanted[0][new])
    assert torch.equal(dq, wanted[1][new])
    for one, other in zip((dk, dv), wanted[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-3)  # blocks of queries begin elsewhere


def test_what_lies_in_the_workspace_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never cleared."""
    given, documents = operands(sum(LENGTHS), 6, 2, 80), Documents.build(LENGTHS)
    found, empty = ours(given, documents), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(255))
    assert all(map(torch.equal, found, ours(given, documents)))


def test_tensors_of_any_strides() -> None:
    """Slices of a wider projection."""
    wide = operands(40, 8, 8, 32)
    given = [wide[0][:, ::2], wide[1][:, :2], wide[2][..., :].transpose(0, 1).contiguous().transpose(0, 1)[:, 3:5]]
    given.append(wide[3][:, 1::2])
    documents = Documents.build((40,))
    assert all(map(torch.equal, ours(given, documents), ours([t.contiguous() for t in given], documents)))


def test_no_documents() -> None:
    """A rank that has none."""
    found = ours(operands(0, 4, 2, 16), Documents.build(()))
    assert [tuple(t.shape) for t in found] == [(0, 4, 16), (0, 4, 16), (0, 2, 16), (0, 2, 16)]


def test_odd_heads_are_not_taken() -> None:
    """Their channels are multiplied in pairs."""
    assert takes(64)
    assert not takes(7)
