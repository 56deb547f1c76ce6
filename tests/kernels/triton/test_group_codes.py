"""Dequantization of matrices in groups against plain PyTorch, bit by bit."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from accessory.kernels.operands import DTYPES
from accessory.kernels.plain import group_codes as plain
from accessory.kernels.triton.group_codes import dequantize
from tests.kernels.formulas import grouped

SHAPES = [(5, 576), (300, 40), (7, 33), (1, 1), (3, 2100)]
"""Words of eight columns; several rows to a program; rows that no word, byte or group divides; several programs."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_bit_is_plain_pytorchs(bits: int, shape: tuple[int, int]) -> None:
    """In every dtype, with zeros and with zero points, with statistics in fp16 and fp32, in every group."""
    for i, (group, points, wide) in enumerate(product([8, 32, 64, 128], [False, True], [False, True])):
        codes, exact = grouped(shape, bits, group, points=points, wide=wide)
        found = dequantize(codes, torch.empty(shape, dtype=DTYPES[i % len(DTYPES)]))
        assert torch.equal(found, plain.dequantize(codes, torch.empty_like(found)))
        assert torch.allclose(found.double(), exact, rtol=1e-2, atol=1e-6)


def test_codes_at_an_odd_address() -> None:
    """A slice of a larger buffer, where a word cannot be read at once."""
    codes, _ = grouped((5, 576), 2, 64)
    buffer = torch.cat([codes.codes.new_zeros(1), codes.codes.flatten()])
    moved = codes._replace(codes=buffer[1:].view_as(codes.codes))
    found = dequantize(moved, torch.empty(5, 576))
    assert torch.equal(found, plain.dequantize(codes, torch.empty(5, 576)))


def test_nothing_to_do_and_another_order() -> None:
    """A rank may hold no rows; columns in another order go to plain PyTorch."""
    assert dequantize(grouped((0, 64), 2, 32)[0], torch.empty(0, 64)).shape == (0, 64)
    codes, w = grouped((3, 64), 2, 32)
    codes = codes._replace(order=torch.arange(64, dtype=torch.int32).flip(0))
    assert torch.equal(dequantize(codes, torch.empty(3, 64)), w.flip(1).float())


def test_what_does_not_fit_is_refused() -> None:
    """Before a pointer is followed beyond its end."""
    codes, _ = grouped((3, 64), 2, 32)
    for change, message in (
        ({"out": torch.empty(3, 64, dtype=torch.float64)}, "out is torch.float64"),
        ({"out": torch.empty(3, 32)}, r"out is \[3, 32\]; expected"),
        ({"out": torch.empty(3, 128)[:, :64]}, r"out has strides \(128, 1\)"),
        ({"scales": torch.empty(2, 2).half()}, r"scales is torch.float16 \[2, 2\]"),
    ):
        given = codes._replace(**{name: part for name, part in change.items() if name in codes._fields})
        with pytest.raises(AssertionError, match=message):
            dequantize(given, change.get("out", torch.empty(3, 64)))
