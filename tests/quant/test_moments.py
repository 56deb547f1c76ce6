"""8-bit moments against bitsandbytes' own functions and the format's definition."""

from __future__ import annotations

import bitsandbytes.functional as reference
import pytest
import torch

from accessory.quant.moments import BLOCK, levels, pack_moment, unpack_moment, zero_code

CPU = torch.device("cpu")


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(3, 256), (5, 77), (40,)])
def test_packing_is_bitsandbytes(signed: bool, shape: tuple[int, ...]) -> None:
    """Codes, scales and the values they stand for, blocks running over the ends of rows."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = values if signed else values.square()
    codes, scales = pack_moment(values, signed)
    expected, state = reference.quantize_blockwise(values, code=reference.create_dynamic_map(signed), blocksize=256)
    assert torch.equal(codes, expected) and torch.equal(scales, state.absmax)
    assert (codes.dtype, codes.shape, len(scales)) == (torch.uint8, shape, -(-values.numel() // BLOCK))
    back = unpack_moment(codes, scales, signed)
    assert torch.equal(back, reference.dequantize_blockwise(expected, state))
    largest = torch.cat([block.abs().max()[None] for block in values.flatten().split(BLOCK)])
    assert torch.equal(scales, largest)
    error = (back - values).abs().flatten() / scales.repeat_interleave(BLOCK)[: values.numel()]
    assert error.max() < 0.5 * levels(signed, CPU).diff().max() + 1e-6


def test_zero_and_nothing() -> None:
    """0 has a code of its own; a shard may have no values."""
    for signed in (True, False):
        assert levels(signed, CPU)[zero_code(signed)] == 0
        codes, scales = pack_moment(torch.zeros(0, 4), signed)
        assert (codes.shape, codes.dtype, len(scales)) == ((0, 4), torch.uint8, 0)
        assert unpack_moment(codes, scales, signed).shape == (0, 4)
        assert not unpack_moment(*pack_moment(torch.zeros(300), signed), signed).any()
