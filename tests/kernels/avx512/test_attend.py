"""Attention in C++ with its gradients, as a model calls it, beside plain PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from accessory import kernels
from accessory.kernels.avx512 import document_attention
from accessory.kernels.documents import Documents

LENGTHS, SHARED = (60, 75, 41, 80), (0, 33, 20, 41)


def value_and_gradients(shared: tuple[int, ...], window: int | None, dtype: torch.dtype) -> list[Tensor]:
    """Of random q, k and v, whose results are weighed at random."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS) - sum(shared)
    given = [torch.randn(tokens, n, 32, generator=generator).bfloat16().to(dtype).requires_grad_() for n in (6, 2, 2)]
    out = kernels.of("document_attention", given[0], 32).attend(*given, Documents.build(LENGTHS, shared), window)
    weights = torch.randn(out.shape, generator=generator).bfloat16().to(dtype)
    return [out.detach(), *torch.autograd.grad(out, given, weights)]


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("shared", [(0, 0, 0, 0), SHARED])
def test_beside_plain_pytorch(
    switch_cpu_kernels: Callable[[bool], None], shared: tuple[int, ...], window: int | None
) -> None:
    """As near to float64 as plain PyTorch in bf16, documents that begin alike included."""
    found = value_and_gradients(shared, window, torch.bfloat16)
    wanted = value_and_gradients(shared, window, torch.float64)
    switch_cpu_kernels(False)
    twins = value_and_gradients(shared, window, torch.bfloat16)
    assert not all(map(torch.equal, found, twins))
    for one, twin, exact in zip(found, twins, wanted, strict=True):
        assert (one - exact).norm() < 1.1 * (twin - exact).norm() < 5e-3 * exact.norm()


def test_keeps_no_scores() -> None:
    """q, k and v."""
    saved: list[Tensor] = []
    given = [torch.ones(20, n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        document_attention.attend(*given, Documents.build((20,)))
    assert [tuple(t.shape) for t in saved] == [(20, heads, 16) for heads in (4, 2, 2)]


def test_a_plan_knows_its_bytes() -> None:
    """Gradients, and every thread's workspace: of one long document more than of many short ones."""
    short, long = (
        document_attention.backward_bytes((n,) * (4096 // n), 32, 8, 128, torch.bfloat16) for n in (128, 4096)
    )
    assert 4096 * 48 * 128 * 2 < short < long < 10 * short
