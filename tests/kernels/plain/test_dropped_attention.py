"""Attention with dropped weights against a float64 formula of the same ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accessory.kernels.documents import Documents
from accessory.kernels.plain import document_attention, dropped_attention
from tests.memory.allocated_peak import AllocatedPeak

LENGTHS, HEADS, KV_HEADS, WIDTH, SHARE, SEED = (7, 1, 12), 4, 2, 8, 0.25, 5
CPU = torch.device("cpu")


def given(dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """q, k, v and the result's gradient."""
    generator = torch.Generator().manual_seed(0)
    counts = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(sum(lengths), n, WIDTH, generator=generator).to(dtype) for n in counts]


def formula(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, share: float) -> Tensor:
    """By autograd, one document and query head at a time."""
    kept = dropped_attention.kept_weights(LENGTHS, HEADS, KV_HEADS, share, SEED, CPU)
    out, begin = [], 0
    for length in LENGTHS:
        at, heads = slice(begin, begin + length), []
        for head in range(KV_HEADS):
            of_group = next(kept)
            for i in range(HEADS // KV_HEADS):
                scores = q[at, head * (HEADS // KV_HEADS) + i] @ k[at, head].t() * scale
                age = torch.arange(length)[:, None] - torch.arange(length)
                hidden = (age < 0) | (age >= (window or length))
                weights = scores.masked_fill(hidden, -torch.inf).softmax(-1) * of_group[i] / (1 - share)
                heads.append(weights @ v[at, head])
        out.append(torch.stack(heads, 1))
        begin += length
    return torch.cat(out)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("window", [None, 3])
def test_forward_and_backward(dtype: torch.dtype, tolerance: float, window: int | None) -> None:
    """Grouped heads, a document of one token, and a scale of one's own."""
    *qkv, dout = given(dtype)
    ours, theirs = ([t.to(kind).clone().requires_grad_() for t in qkv] for kind in (dtype, torch.float64))
    found = dropped_attention.attend(*ours, Documents.build(LENGTHS), window, 0.3, SHARE, SEED)
    wanted = formula(*theirs, window, 0.3, SHARE)
    found.backward(dout)
    wanted.backward(dout.double())
    assert found.dtype == dtype
    for one, other in ((found, wanted), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))):
        assert (one.double() - other).norm() <= tolerance * other.norm()


def test_without_dropout_it_is_attention() -> None:
    """As the kernel in use computes it."""
    q, k, v, _ = given(torch.float64)
    found = dropped_attention.attend(q, k, v, Documents.build(LENGTHS), None, None, 0.0, SEED)
    torch.testing.assert_close(found, document_attention.attend(q, k, v, Documents.build(LENGTHS)))


def test_the_share_that_is_dropped() -> None:
    """And each seed drops others."""
    masks = [next(dropped_attention.kept_weights((200,), 4, 2, SHARE, seed, CPU)) for seed in (1, 1, 2)]
    assert (~masks[0]).float().mean().item() == pytest.approx(SHARE, abs=5e-3)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_shared_beginnings_are_refused() -> None:
    q, k, v, _ = given(torch.float64, (4, 1))
    with pytest.raises(AssertionError, match="share a beginning"):
        dropped_attention.attend(q, k, v, Documents.build((4, 3), (0, 2)), None, None, SHARE, SEED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_known_before(dtype: torch.dtype) -> None:
    """Within 2 % of what is allocated."""
    lengths = (300, 120)
    *qkv, dout = given(dtype, lengths)
    qkv = [t.requires_grad_() for t in qkv]
    sizes = lengths, HEADS, KV_HEADS, WIDTH, dtype
    with AllocatedPeak() as peak:
        out = dropped_attention.attend(*qkv, Documents.build(lengths), None, None, SHARE, SEED)
    assert peak.bytes - out.nbytes == pytest.approx(dropped_attention.forward_bytes(*sizes), rel=0.02)
    with AllocatedPeak() as peak:
        out.backward(dout)
    assert peak.bytes == pytest.approx(dropped_attention.backward_bytes(*sizes), rel=0.02)
