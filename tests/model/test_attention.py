"""Attention against a softmax written out, document by document."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from accessory.model.attention import attend, attend_cached
from accessory.model.cache import LayerCache
from accessory.model.sequences import Sequences

HEADS, KV_HEADS, WIDTH = 6, 2, 8
FREQUENCIES = torch.ones(WIDTH // 2)
LENGTHS = (5, 1, 9)


def qkv(dtype: torch.dtype = torch.float32, kv_heads: int = KV_HEADS, tokens: int = sum(LENGTHS)) -> list[Tensor]:
    """Random q [T, H, E], k and v [T, K, E]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, heads, WIDTH, generator=generator).to(dtype) for heads in (HEADS, kv_heads, kv_heads)]


def written_out(q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor:
    """One document in float64: queries [S, H, E] at positions from `start` against keys [start + S, K, E]."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        for i in range(len(q)):
            seen = slice(0, start + i + 1)
            weights = (k[seen, shared] @ q[i, head] / math.sqrt(q.shape[-1])).softmax(0)
            out[i, head] = weights @ v[seen, shared]
    return out


def per_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`written_out` for each of the packed documents."""
    return torch.cat([written_out(*parts) for parts in zip(*(t.split(LENGTHS) for t in (q, k, v)), strict=True)])


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_equals_softmax(kv_heads: int) -> None:
    """Multi-query, grouped and full attention over three packed documents."""
    q, k, v = qkv(kv_heads=kv_heads)
    found = attend(q, k, v, Sequences.build(LENGTHS, FREQUENCIES))
    torch.testing.assert_close(found.double(), per_document(q, k, v), rtol=1e-5, atol=1e-6)


def test_gradients_equal_softmax() -> None:
    """Of q, k and v, grouped."""
    ours, theirs = ([t.requires_grad_() for t in qkv()] for _ in range(2))
    attend(*ours, Sequences.build(LENGTHS, FREQUENCIES)).square().sum().backward()
    total = 0
    for q, k, v in zip(*(t.split(LENGTHS) for t in theirs), strict=True):
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        scores = torch.einsum("ihe,jhe->hij", q, k) / math.sqrt(WIDTH)
        scores = scores + torch.full(scores.shape[1:], -torch.inf).triu(1)
        total = total + torch.einsum("hij,jhe->ihe", scores.softmax(-1), v).square().sum()
    total.backward()
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-5)


def test_documents_do_not_see_each_other() -> None:
    """Other keys and values in the middle document change no bit of its neighbours."""
    q, k, v = qkv()
    sequences = Sequences.build(LENGTHS, FREQUENCIES)
    before = attend(q, k, v, sequences)
    k[5:6] += 1
    v[5:6] += 1
    after = attend(q, k, v, sequences)
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[6:], after[6:])
    assert not torch.equal(before[5:6], after[5:6])


def fed(steps: list[tuple[int, ...]]) -> Tensor:
    """The packed documents' outputs when they are fed to a cache in `steps` of new tokens each."""
    q, k, v = (t.split(LENGTHS) for t in qkv())
    cache = LayerCache((len(LENGTHS), max(LENGTHS), KV_HEADS, WIDTH), torch.float32, torch.device("cpu"))
    starts, outputs = (0,) * len(LENGTHS), [[] for _ in LENGTHS]
    for lengths in steps:
        sequences = Sequences.build(lengths, FREQUENCIES, starts)
        new = [torch.cat([t[i][s : s + n] for i, (s, n) in enumerate(zip(starts, lengths, strict=True))])
               for t in (q, k, v)]  # fmt: skip
        cache.store(new[1], new[2], sequences)
        for part, output in zip(attend_cached(new[0], cache, sequences).split(lengths), outputs, strict=True):
            output.append(part)
        starts = tuple(s + n for s, n in zip(starts, lengths, strict=True))
    assert starts == LENGTHS
    return torch.cat([torch.cat(output) for output in outputs])


@pytest.mark.parametrize(
    "steps", [[LENGTHS], [(2, 1, 4), (3, 0, 5)], [(4, 0, 8), (1, 1, 1)], [(3, 0, 0), (1, 0, 8), (1, 1, 1)]]
)
def test_cache_equals_softmax(steps: list[tuple[int, ...]]) -> None:
    """All at once, in chunks behind a filled cache, and as one decoding step of documents of different length."""
    torch.testing.assert_close(fed(steps).double(), per_document(*qkv()), rtol=1e-5, atol=1e-6)


def test_decoding_one_document() -> None:
    """A lone document, token by token."""
    q, k, v = qkv(tokens=4)
    cache = LayerCache((1, 4, KV_HEADS, WIDTH), torch.float32, torch.device("cpu"))
    parts = []
    for i in range(4):
        sequences = Sequences.build((1,), FREQUENCIES, (i,))
        cache.store(k[i : i + 1], v[i : i + 1], sequences)
        parts.append(attend_cached(q[i : i + 1], cache, sequences))
    torch.testing.assert_close(torch.cat(parts).double(), written_out(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel is for CUDA")
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_cuda_kernel_equals_softmax(kv_heads: int) -> None:
    """In bf16, forward within 1 % of the largest value."""
    q, k, v = (t.cuda() for t in qkv(torch.bfloat16, kv_heads))
    found = attend(q, k, v, Sequences.build(LENGTHS, FREQUENCIES.cuda())).cpu().double()
    wanted = per_document(q.cpu(), k.cpu(), v.cpu())
    assert (found - wanted).abs().max() < 0.01 * wanted.abs().max()
