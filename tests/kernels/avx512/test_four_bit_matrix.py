"""How the kernels are told of 4-bit matrices."""

from __future__ import annotations

import pytest
import torch

from accessory.kernels.avx512.four_bit_matrix import packed, takes
from accessory.kernels.codes import Codes


def codes(**others) -> Codes:
    """Of a double-quantized W [4, 128]."""
    tensors = {"codes": torch.zeros(256, dtype=torch.uint8), "scales": torch.zeros(8, dtype=torch.uint8)}
    nested = torch.zeros(256), torch.zeros(1), torch.zeros(1)
    return Codes(**{"shape": (4, 128), "codebook": torch.zeros(16), "nested": nested, **tensors, **others})


def test_which_shapes() -> None:
    """Others are unpacked whole."""
    assert takes((34, 64))
    assert not takes((33, 64))
    assert not takes((34, 96))
    assert not takes((0, 64))


def test_addresses() -> None:
    """Of each tensor; of what is not nested there is none."""
    nested = codes()
    found = packed(nested)
    assert (found.n, found.k) == (4, 128)
    assert (found.codes, found.codebook, found.scales) == tuple(t.data_ptr() for t in nested[1:4])
    assert (found.nested_codebook, found.nested_scales, found.offset) == tuple(t.data_ptr() for t in nested.nested)
    assert packed(codes(scales=torch.zeros(8), nested=None)).nested_codebook is None


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (
            {"codes": torch.zeros(255, dtype=torch.uint8)},
            r"codes is torch.uint8 \[255\] .*; expected .* \[256\]",
        ),
        ({"codes": torch.zeros(512, dtype=torch.uint8)[::2]}, r"codes is .* strides \(2,\); .* contiguous"),
        ({"codebook": torch.zeros(16).double()}, "codebook is torch.float64"),
        ({"scales": torch.zeros(8)}, "scales is torch.float32 .*; expected torch.uint8"),
        ({"nested": None}, "scales is torch.uint8 .*; expected torch.float32"),
        (
            {"nested": (torch.zeros(256), torch.zeros(2), torch.zeros(1))},
            r"nested_scales is .* \[2\] .*; expected .* \[1\]",
        ),
    ],
)
def test_refused(others: dict, said: str) -> None:
    """By name: a kernel would read other memory."""
    with pytest.raises(AssertionError, match=said):
        packed(codes(**others))
