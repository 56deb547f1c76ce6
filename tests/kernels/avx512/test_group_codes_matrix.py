"""How the kernels are told of matrices in groups, and what they unpack to."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from accessory.kernels.avx512.group_codes import dequantize
from accessory.kernels.avx512.group_codes_matrix import in_c, takes
from accessory.kernels.plain import group_codes as plain
from tests.kernels.avx512.test_group_codes_product import FORMATS, SHAPES
from tests.kernels.formulas import grouped

ORDER = {"order": torch.arange(64, dtype=torch.int32).flip(0)}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_unpacked_to_the_bit(bits: int, group: int, shape: tuple[int, int]) -> None:
    """As by plain PyTorch; not a number behind the matrix is written."""
    for points, wide in product([False, True], repeat=2):
        codes, _ = grouped(shape, bits, group, points=points, wide=wide)
        memory = torch.full((shape[0] * shape[1] + 40,), 7.0).bfloat16()
        found = dequantize(codes, memory[:-40].view(shape))
        assert torch.equal(found, plain.dequantize(codes, torch.empty_like(found)))
        assert (memory[-40:] == 7).all()


def test_which_matrices() -> None:
    """Others are unpacked whole, by plain PyTorch."""
    codes, _ = grouped((3, 64), 2, 32)
    assert takes(codes, grouped((5, 33), 3, 128)[0])
    assert not takes(codes, grouped((3, 64), 2, 16)[0])
    assert not takes(grouped((3, 192), 2, 96)[0])
    assert not takes(grouped((0, 64), 2, 32)[0])
    for others in (ORDER, {"channel_scale": torch.ones(64).half()}, {"groups": torch.zeros(64, dtype=torch.int32)}):
        assert not takes(codes, codes._replace(**others))


def test_unpacked_in_another_order() -> None:
    """By plain PyTorch."""
    codes, w = grouped((3, 64), 2, 32)
    found = dequantize(codes._replace(**ORDER), torch.empty(3, 64, dtype=torch.bfloat16))
    assert torch.equal(found, w.flip(1).bfloat16())


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"codes": torch.zeros(3, 15, dtype=torch.uint8)}, r"codes is torch.uint8 \[3, 15\] .*; expected .* \[3, 16\]"),
        ({"scales": torch.zeros(3, 2).double()}, "scales is torch.float64"),
        (ORDER, "order True, channel_scale False, groups False; expected groups of a power of two"),
    ],
)
def test_refused(others: dict, said: str) -> None:
    """By name: a kernel would read other memory."""
    codes, _ = grouped((3, 64), 2, 32)
    with pytest.raises(AssertionError, match=said):
        in_c(codes._replace(**others))
