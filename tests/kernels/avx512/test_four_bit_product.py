"""Products with 4-bit matrices in C++, against float64 of the matrices that bitsandbytes unpacks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accessory.kernels.avx512.four_bit_product import sum_of_products
from accessory.quant import storage
from accessory.quant.four_bit import FourBitWeight

SHAPES = [(192, 128), (34, 64), (2, 640), (100, 192), (384, 1088)]
ROUNDING = 1.01 * 2**-8


def packed(shape: tuple[int, int], seed: int = 0, kind: str = "nf4") -> FourBitWeight:
    """A random matrix."""
    weight = storage(kind)(shape)
    weight.pack(0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return weight


def random(*shape: int, seed: int = 1) -> Tensor:
    """Random numbers, fp32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, exact: Tensor, terms: Tensor) -> None:
    """`found` rounded once, and summed in fp32; `terms`: what the sums' terms come to, signs aside."""
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= ROUNDING * exact.abs() + 1e-5 * terms).all()


@pytest.mark.parametrize("rows", [1, 5, 12, 13, 500])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["nf4", "nf4_single", "fp4"])
def test_equals_float64(rows: int, shape: tuple[int, int], kind: str) -> None:
    """The matrix is what it unpacks to, in bf16; nothing else is rounded but the result."""
    weight = packed(shape, kind=kind)
    w = weight.unpack(torch.bfloat16).double()
    x, dy = random(rows, shape[1]).bfloat16(), random(rows, shape[0]).bfloat16()
    wide, dwide = x.double(), dy.double()
    codes = [weight.as_codes()]
    close(sum_of_products([x], codes, transposed=False), wide @ w.t(), wide.abs() @ w.t().abs())
    close(sum_of_products([dy], codes, transposed=True), dwide @ w, dwide.abs() @ w.abs())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rank", [1, 2, 5, 16, 48])
def test_what_stands_beside_it(rank: int) -> None:
    """A bias and a product of low rank, even or odd, a slice of a wider one; and sums of matrices of unlike scales."""
    one, other = packed((34, 192)), packed((100, 192), seed=5, kind="nf4_single")
    w, v = (m.unpack(torch.bfloat16).double() for m in (one, other))
    x, dy, dz = (random(30, n, seed=n).bfloat16() for n in (192, 34, 100))
    low, a, b, bias = random(30, rank + 3).bfloat16()[:, 3:], random(rank, 192), random(34, rank), random(34)
    found = sum_of_products([x], [one.as_codes()], transposed=False, bias=bias, low=(low, b, 0.7))
    beside = low.double() @ (0.7 * b).bfloat16().double().t()
    close(found, x.double() @ w.t() + beside + bias.double(), x.double().abs() @ w.t().abs() + 10)
    found = sum_of_products([dy, dz], [m.as_codes() for m in (one, other)], transposed=True, low=(low, a, 0.7))
    beside = low.double() @ (0.7 * a).bfloat16().double()
    close(found, dy.double() @ w + dz.double() @ v + beside, dy.double().abs() @ w.abs() + 10)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("transposed", [False, True])
def test_neither_threads_nor_other_rows_change_a_bit(transposed: bool) -> None:
    """A row is summed in one order."""
    weight = packed((384, 1088))
    x = random(700, 384 if transposed else 1088).bfloat16()
    found = sum_of_products([x], [weight.as_codes()], transposed=transposed)
    assert torch.equal(found[470:490], sum_of_products([x[470:490]], [weight.as_codes()], transposed=transposed))
    torch.set_num_threads(1)
    assert torch.equal(found, sum_of_products([x], [weight.as_codes()], transposed=transposed))


def test_deep_matrices() -> None:
    """Whose panels do not fit side by side."""
    weight = packed((128, 17408))
    x = random(20, 17408).bfloat16()
    w = weight.unpack(torch.bfloat16).double()
    close(
        sum_of_products([x], [weight.as_codes()], transposed=False), x.double() @ w.t(), x.double().abs() @ w.t().abs()
    )


def test_no_rows() -> None:
    """A rank without a document."""
    weight = packed((34, 64))
    assert sum_of_products([random(0, 64).bfloat16()], [weight.as_codes()], transposed=False).shape == (0, 34)
