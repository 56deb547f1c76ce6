"""Which x packed matrices are multiplied with, and what a copy of them is. What they compute: see each format's."""

from __future__ import annotations

import copy

import torch

from accessory.kernels.avx512.packed_gemv import MOST_ROWS
from tests.kernels.avx512.test_four_bit_gemv import packed, random, ready


def test_which_x() -> None:
    """bf16 on a CPU, few rows; any strides."""
    matrices = ready([packed((34, 64))])
    x = random(MOST_ROWS, 80).bfloat16()[:, 8:72]
    assert matrices.takes(x)
    assert torch.equal(matrices.multiply(x)[0], matrices.multiply(x.contiguous())[0])
    assert not matrices.takes(random(1, 64))
    assert not matrices.takes(random(MOST_ROWS + 1, 64).bfloat16())
    assert not matrices.takes(torch.empty(1, 64, dtype=torch.bfloat16, device="meta"))


def test_no_rows() -> None:
    """A rank without a document."""
    (found,) = ready([packed((34, 64))]).multiply(random(0, 64).bfloat16())
    assert found.shape == (0, 34)


def test_a_copy_has_memory_of_its_own() -> None:
    """Its results do not change with the matrix that it was copied from."""
    weight, x = packed((34, 64)), random(2, 64).bfloat16()
    matrices = ready([weight])
    wanted, copied = matrices.multiply(x)[0], copy.deepcopy(matrices)
    weight.codes.zero_()
    assert torch.equal(copied.multiply(x)[0], wanted)
    assert not torch.equal(matrices.multiply(x)[0], wanted)
