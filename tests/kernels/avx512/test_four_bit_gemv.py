"""Few rows times 4-bit matrices in C++, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accessory.kernels.addition import Addition
from accessory.kernels.avx512.four_bit_gemv import MOST_ROWS, Matrices
from accessory.kernels.bitsandbytes_library import plain_scales
from accessory.quant import storage
from accessory.quant.four_bit import BLOCK, FourBitWeight, codebook_of

SHAPES = [(192, 192), (34, 192), (2, 192)]
STORAGES = ["nf4", "nf4_single", "fp4"]


def random(*shape: int, seed: int = 1) -> Tensor:
    """Random numbers, fp32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(shape: tuple[int, int], seed: int = 0, kind: str = "nf4") -> FourBitWeight:
    """A random matrix."""
    weight = storage(kind)(shape)
    weight.pack(0.05 * random(*shape, seed=seed))
    return weight


def exact(weight: FourBitWeight) -> Tensor:
    """What it is here, in float64: code values in bf16 times exact scales."""
    table = codebook_of(weight.quant_type)
    codes = weight.as_codes()
    scales = codes.scales if codes.nested is None else plain_scales(codes.scales, *codes.nested)
    scales = scales.double().repeat_interleave(BLOCK)
    values = torch.stack([weight.codes >> 4, weight.codes & 15], -1).view(-1).long()
    return (table.bfloat16().double()[values] * scales).view(weight.shape)


def ready(weights: list[FourBitWeight]) -> Matrices:
    """To be multiplied with."""
    return Matrices([weight.as_codes() for weight in weights])


def close(found: Tensor, wanted: Tensor, terms: Tensor) -> None:
    """`found` rounded once, and summed in fp32; `terms`: what the sums' terms come to, signs aside."""
    assert found.dtype == torch.bfloat16
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= 1.01 * 2**-8 * wanted.abs() + 1e-5 * terms).all()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 15, MOST_ROWS])
@pytest.mark.parametrize("kind", STORAGES)
def test_equals_float64(rows: int, kind: str) -> None:
    """Of three matrices, whole and not in sixteens of rows, together."""
    weights = [packed(shape, seed=i, kind=kind) for i, shape in enumerate(SHAPES)]
    x = random(rows, 192).bfloat16()
    for found, w in zip(ready(weights).multiply(x), map(exact, weights), strict=True):
        close(found, x.double() @ w.t(), x.double().abs() @ w.t().abs())


@pytest.mark.parametrize("columns", [64, 640, 8192])
def test_columns(columns: int) -> None:
    """One block, and many, whose scales share others across rows."""
    weight, x = packed((20, columns)), random(5, columns).bfloat16()
    (found,) = ready([weight]).multiply(x)
    close(found, x.double() @ exact(weight).t(), x.double().abs() @ exact(weight).t().abs())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, 6, 19])
@pytest.mark.parametrize("rank", [1, 5, 16, 17, 48])
def test_what_stands_beside_it(rows: int, rank: int) -> None:
    """LoRA and a bias, either alone, or none: added before the one rounding; a factor in bf16, a bias in float64."""
    weights = [packed((n, 192), seed=n) for n in (34, 16, 48, 100)]
    x, (a, b) = random(rows, 192).bfloat16(), (random(rank, 192, seed=2), random(34, rank, seed=3))
    c, d = random(48, rank, seed=4).bfloat16(), random(48, seed=5)
    beside = [
        Addition(a=a, b=b, scale=0.7),
        Addition(),
        Addition(d, a, c, -1.5),
        Addition(random(100, seed=6).double()),
    ]
    wide, low = x.double(), x.double() @ a.double().t()
    more = [0.7 * low @ b.double().t(), 0, -1.5 * low @ c.double().t() + d.double(), beside[3].bias]
    for found, weight, added in zip(ready(weights).multiply(x, beside), weights, more, strict=True):
        w = exact(weight).t()
        close(found, wide @ w + added, wide.abs() @ w.abs() + low.abs().sum(1, keepdim=True) + 1)


@pytest.mark.usefixtures("threads")
def test_neither_threads_nor_other_rows_change_a_bit() -> None:
    """So that a batch gets what each of its prompts gets alone."""
    matrices, x = ready([packed((192, 192)), packed((34, 192))]), random(MOST_ROWS, 192).bfloat16()
    beside = [Addition(random(n), random(16, 192), random(n, 16), 0.5) for n in (192, 34)]
    together = matrices.multiply(x, beside)
    torch.set_num_threads(1)
    for i in range(MOST_ROWS):
        for all_of_them, one in zip(together, matrices.multiply(x[i : i + 1], beside), strict=True):
            assert torch.equal(all_of_them[i : i + 1], one)
