"""Products with plain and packed matrices, and what stands beside them, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accessory.quant import storage
from accessory.quant.packed import LowRankTerm
from accessory.quant.products import Matrix, multiply, sum_of_turned_products

KINDS = ["plain", "plain in fp32", "nf4", "nf4_single", "int8", "nf4, odd shape"]


def random(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers, fp32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(kind: str, seed: int = 0) -> Matrix:
    """Of 34 rows."""
    shape = (34, 96) if kind == "nf4, odd shape" else (34, 128)
    values = 0.05 * random(*shape, seed=seed)
    if kind.startswith("plain"):
        return values if "fp32" in kind else values.bfloat16()
    weight = storage(kind.split(",")[0])(shape)
    weight.pack(values)
    return weight


def wide(w: Matrix) -> Tensor:
    """What bf16 products multiply with, in float64."""
    return (w.bfloat16() if isinstance(w, Tensor) else w.unpack(torch.bfloat16)).double()


def error(found: Tensor, exact: Tensor) -> float:
    """Relative to the norm."""
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("avx512", ["0", "1"])
@pytest.mark.parametrize("rank", [0, 3, 8])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64(monkeypatch: pytest.MonkeyPatch, kind: str, biased: bool, rank: int, avx512: str) -> None:
    """In bf16, to its rounding, with the CPU's kernel and without."""
    monkeypatch.setenv("ACCESSORY_AVX512", avx512)
    one, other = matrix(kind), matrix(kind, seed=1)
    (n, k), w, v = one.shape, wide(one), wide(other)
    x, dy, dz, bias = random(20, k).bfloat16(), random(20, n).bfloat16(), random(20, n, seed=2).bfloat16(), random(n)
    low, a, b = random(20, rank).bfloat16(), random(rank, k), random(n, rank)
    y = multiply(x, one, bias if biased else None, LowRankTerm(low, b, 0.5) if rank else None)
    exact = x.double() @ w.t() + 0.5 * low.double() @ b.bfloat16().double().t() + biased * bias.double()
    dx = sum_of_turned_products([dy, dz], [one, other], LowRankTerm(low, a, 0.5) if rank else None)
    assert y.dtype == dx.dtype == torch.bfloat16
    assert error(y, exact) < 4e-3
    assert error(dx, dy.double() @ w + dz.double() @ v + 0.5 * low.double() @ a.bfloat16().double()) < 5e-3


@pytest.mark.parametrize("avx512", ["0", "1"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_young_lora_adds_is_not_lost(monkeypatch: pytest.MonkeyPatch, kind: str, avx512: str) -> None:
    """A thousandth of the result each: added to one that is rounded, nothing of it would be left."""
    monkeypatch.setenv("ACCESSORY_AVX512", avx512)
    weight = matrix(kind)
    x = random(400, weight.shape[1]).bfloat16()
    without = multiply(x, weight).double()
    size = 1e-3 * float(without.abs().mean())
    low, b = torch.ones(400, 2, dtype=torch.bfloat16), torch.full((34, 2), size)
    found = multiply(x, weight, None, LowRankTerm(low, b, 0.5)).double()
    assert float((found - without).mean()) == pytest.approx(size, rel=0.25)
