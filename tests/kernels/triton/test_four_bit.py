"""4-bit dequantization against bitsandbytes, bit by bit."""

from __future__ import annotations

from itertools import product

import bitsandbytes.functional as reference
import pytest
import torch
from torch import Tensor

from accessory.kernels.codes import Codes
from accessory.kernels.operands import DTYPES
from accessory.kernels.triton import four_bit

SHAPES = [(64, 128), (5, 26), (3, 2), (257, 256)]
"""Whole blocks; a last block and a last word that are not full; less than a word; several groups of nested scales."""


def dequantize(given: Codes, dtype: torch.dtype) -> Tensor:
    """Into new memory."""
    return four_bit.dequantize(given, torch.empty(given.shape, dtype=dtype))


def packed(shape: tuple[int, int], quant_type: str, nested: bool) -> tuple[Codes, reference.QuantState]:
    """A random matrix, and bitsandbytes' state of it."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    codes, state = reference.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=quant_type)
    more = (state.state2.code, state.state2.absmax, state.offset.view(1)) if nested else None
    return Codes(shape, codes.flatten(), state.code, state.absmax, more, quant_type), state


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("quant_type", "nested"), list(product(["nf4", "fp4"], [True, False])))
def test_every_bit_is_bitsandbytes(shape: tuple[int, int], quant_type: str, nested: bool) -> None:
    """In every dtype."""
    given, state = packed(shape, quant_type, nested)
    for dtype in DTYPES:
        state.dtype = dtype
        wanted = reference.dequantize_4bit(given.codes.view(-1, 1), state)
        found = dequantize(given, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, wanted), dtype


def test_formula() -> None:
    """A code's value times its block's decoded scale, written out, each step rounded to fp32."""
    given, _ = packed((5, 26), "nf4", True)
    nested_codebook, nested_scales, offset = given.nested
    wanted = []
    for i in range(130):
        code = int(given.codes[i // 2]) >> (0 if i % 2 else 4) & 15
        scale = nested_codebook[int(given.scales[i // 64])] * nested_scales[0] + offset[0]
        wanted.append(given.codebook[code] * scale)
    assert torch.equal(dequantize(given, torch.float32).flatten(), torch.stack(wanted))


def test_codes_at_an_odd_address() -> None:
    """A slice of a larger buffer, where four bytes cannot be read at once."""
    given, _ = packed((64, 128), "nf4", True)
    wanted = dequantize(given, torch.bfloat16)
    buffer = torch.cat([given.codes.new_zeros(3), given.codes])
    given = given._replace(codes=buffer[3:])
    assert torch.equal(dequantize(given, torch.bfloat16), wanted)


def test_into_a_buffer() -> None:
    """The beginning of a longer one is written, and not a number more."""
    given, _ = packed((5, 26), "nf4", True)
    buffer = torch.full((200,), 7.0, dtype=torch.bfloat16)
    found = four_bit.dequantize(given, buffer[:130].view(5, 26))
    assert found.data_ptr() == buffer.data_ptr()
    assert torch.equal(found, dequantize(given, torch.bfloat16))
    assert (buffer[130:] == 7).all()


def test_nothing_to_do() -> None:
    """A rank may hold no rows."""
    empty = Codes((0, 64), torch.empty(0, dtype=torch.uint8), torch.empty(16), torch.empty(0), None)
    assert dequantize(empty, torch.bfloat16).shape == (0, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.empty(64, 128, dtype=torch.float64)}, r"out is torch.float64; kernels take"),
        ({"out": torch.empty(64, 64)}, r"out is \[64, 64\]; expected \[64, 128\]"),
        ({"out": torch.empty(64, 256)[:, :128]}, r"out has strides \(256, 1\).*contiguous"),
        ({"shape": (64, 126)}, r"codes is torch.uint8 \[4096\] .*; expected torch.uint8 \[4032\]"),
        ({"shape": (1, 1)}, "come in pairs; got 1"),
        (
            {"scales": torch.empty(127, dtype=torch.uint8)},
            r"scales is torch.uint8 \[127\] .*; expected .* \[128\]",
        ),
        ({"nested": None}, "scales is torch.uint8 .*expected torch.float32"),
        ({"codebook": torch.empty(16, device="meta")}, "codebook is .* on meta, .*; expected torch.float32 .* on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    """Before a pointer is followed beyond its end."""
    given, _ = packed((64, 128), "nf4", True)
    given = given._replace(**{name: value for name, value in change.items() if name in given._fields})
    with pytest.raises(AssertionError, match=message):
        four_bit.dequantize(given, change.get("out", torch.empty(given.shape)))
