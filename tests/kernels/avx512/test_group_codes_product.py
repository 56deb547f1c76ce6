"""Products with matrices in groups in C++, against float64 of the matrices that plain PyTorch unpacks."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from accessory.kernels.avx512.group_codes_product import sum_of_products
from accessory.kernels.codes import GroupCodes
from accessory.kernels.plain import group_codes as plain
from tests.kernels.formulas import grouped, random

SHAPES = [(192, 128), (34, 576), (7, 33), (1, 1), (100, 190), (65, 1091)]
"""Whole groups; a shorter last one; odd rows and columns; less than a byte; no multiple of 2, 4, 8 or 16."""
FORMATS = list(product([2, 3, 4], [32, 64, 128, 1024]))
ROUNDING = 1.01 * 2**-8


def close(found: Tensor, exact: Tensor, terms: Tensor) -> None:
    """`found` rounded once, and summed in fp32; `terms`: what the sums' terms come to, signs aside."""
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= ROUNDING * exact.abs() + 1e-5 * terms).all()


def in_bf16(codes: GroupCodes) -> Tensor:
    """The weights that are multiplied with: rounded to bf16."""
    return plain.dequantize(codes, torch.empty(codes.shape, dtype=torch.bfloat16)).double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_equals_float64(bits: int, group: int, shape: tuple[int, int]) -> None:
    """Both products, with zeros and with zero points, with statistics in fp16 and fp32; nothing but the result is
    rounded again."""
    for points, wide in product([False, True], repeat=2):
        codes, exact = grouped(shape, bits, group, points=points, wide=wide)
        w = in_bf16(codes)
        assert ((w - exact).abs() <= ROUNDING * exact.abs() + 1e-6).all()
        for rows in (1, 13):
            x, dy = random(rows, shape[1]).bfloat16(), random(rows, shape[0]).bfloat16()
            wide_x, wide_dy = x.double(), dy.double()
            close(sum_of_products([x], [codes], transposed=False), wide_x @ w.t(), wide_x.abs() @ w.t().abs())
            close(sum_of_products([dy], [codes], transposed=True), wide_dy @ w, wide_dy.abs() @ w.abs())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("columns", [190, 191])
def test_what_stands_beside_it(rank: int, columns: int) -> None:
    """A bias and LoRA; and sums of matrices of several widths, with odd rows."""
    matrices = [grouped((33, columns), 2, 64)[0], grouped((100, columns), 4, 128)[0], grouped((7, columns), 3, 32)[0]]
    w, v, u = map(in_bf16, matrices)
    x, *dys = (random(30, n, seed=n).bfloat16() for n in (columns, 33, 100, 7))
    low, a, b, bias = random(30, rank).bfloat16(), random(rank, columns), random(33, rank), random(33)
    found = sum_of_products([x], matrices[:1], transposed=False, bias=bias, low=(low, b, 0.7))
    beside = low.double() @ (0.7 * b).bfloat16().double().t()
    close(found, x.double() @ w.t() + beside + bias.double(), x.double().abs() @ w.t().abs() + 10)
    found = sum_of_products(dys, matrices, transposed=True, low=(low, a, 0.7))
    exact = sum(dy.double() @ m for dy, m in zip(dys, (w, v, u), strict=True))
    close(found, exact + low.double() @ (0.7 * a).bfloat16().double(), dys[1].double().abs() @ v.abs() + 10)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("transposed", [False, True])
def test_neither_threads_nor_other_rows_change_a_bit(transposed: bool) -> None:
    """A row is summed in one order."""
    codes, _ = grouped((384, 1088), 2, 64)
    x = random(700, 384 if transposed else 1088).bfloat16()
    found = sum_of_products([x], [codes], transposed=transposed)
    assert torch.equal(found[470:490], sum_of_products([x[470:490]], [codes], transposed=transposed))
    torch.set_num_threads(1)
    assert torch.equal(found, sum_of_products([x], [codes], transposed=transposed))
