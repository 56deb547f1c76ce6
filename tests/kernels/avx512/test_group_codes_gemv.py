"""Few rows times matrices in groups in C++, against float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from accessory.kernels.addition import Addition
from accessory.kernels.avx512.group_codes_gemv import MOST_ROWS, Matrices
from tests.kernels.avx512.test_group_codes_product import FORMATS, SHAPES, close
from tests.kernels.formulas import grouped, random


def check(found: Tensor, x: Tensor, w: Tensor, more: Tensor | float = 0.0) -> None:
    """Weights are not rounded. The terms are those of codes and zeros apart, of about the same size."""
    close(found, x.double() @ w.t() + more, x.double().abs() @ (w.abs() + 1).t())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_equals_float64(bits: int, group: int, shape: tuple[int, int]) -> None:
    """With zeros and with zero points, with statistics in fp16 and fp32, each number of rows of a kernel."""
    for points, wide in product([False, True], repeat=2):
        codes, w = grouped(shape, bits, group, points=points, wide=wide)
        for rows in (1, 2, 4, 15):
            x = random(rows, shape[1]).bfloat16()
            (found,) = Matrices([codes]).multiply(x)
            check(found, x, w)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, 7, 19])
@pytest.mark.parametrize("columns", [576, 191])
def test_several_and_what_stands_beside_them(rows: int, columns: int) -> None:
    """Unlike widths and groups in one call; LoRA and a bias, either alone, or none."""
    kinds = [(34, 2, 64), (17, 4, 128), (48, 3, 32), (100, 2, 64)]
    matrices = [grouped((n, columns), bits, group, seed=n) for n, bits, group in kinds]
    x, (a, b) = random(rows, columns).bfloat16(), (random(5, columns, seed=2), random(34, 5, seed=3))
    c, d = random(48, 5, seed=4).bfloat16(), random(48, seed=5)
    beside = [Addition(a=a, b=b, scale=0.7), Addition(), Addition(d, a, c, -1.5), Addition(random(100, seed=6))]
    low = x.double() @ a.double().t()
    more = [0.7 * low @ b.double().t(), 0.0, -1.5 * low @ c.double().t() + d.double(), beside[3].bias.double()]
    found = Matrices([codes for codes, _ in matrices]).multiply(x, beside)
    for one, (_, w), added in zip(found, matrices, more, strict=True):
        check(one, x, w, added)


@pytest.mark.usefixtures("threads")
def test_neither_threads_nor_other_rows_change_a_bit() -> None:
    """So that a batch gets what each of its prompts gets alone."""
    matrices = Matrices([grouped((n, 600), bits, 64)[0] for n, bits in ((192, 2), (35, 3), (34, 4))])
    x = random(MOST_ROWS, 600).bfloat16()
    together = matrices.multiply(x)
    torch.set_num_threads(1)
    for i in range(MOST_ROWS):
        for all_of_them, one in zip(together, matrices.multiply(x[i : i + 1]), strict=True):
            assert torch.equal(all_of_them[i : i + 1], one)


def test_large_numbers_in_a_few_channels() -> None:
    """As models have them: codes become larger numbers while they are multiplied, and others must not suffer."""
    codes, w = grouped((40, 576), 2, 64)
    x = random(3, 576)
    x[:, [5, 100]] *= 1000
    x = x.bfloat16()
    (found,) = Matrices([codes]).multiply(x)
    check(found, x, w)


def test_no_rows() -> None:
    """A rank without a document."""
    (found,) = Matrices([grouped((34, 64), 2, 32)[0]]).multiply(random(0, 64).bfloat16())
    assert found.shape == (0, 34)
