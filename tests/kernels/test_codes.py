"""What kernels are given is checked: they read by address."""

from __future__ import annotations

import pytest
import torch

from accessory.kernels.codes import GroupCodes

CPU = torch.device("cpu")


def codes(bits: int = 3, columns: int = 100) -> GroupCodes:
    """W [6, columns] in groups of 64."""
    groups, width = -(-columns // 64), 2 if bits == 4 else 4
    high = torch.zeros(6, -(-columns // 8), dtype=torch.uint8) if bits == 3 else None
    scales = torch.ones(6, groups).half()
    return GroupCodes(
        (6, columns), bits, 64, torch.zeros(6, -(-columns // width), dtype=torch.uint8), high, scales, scales
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [1, 7, 64, 100])
def test_what_fits(bits: int, columns: int) -> None:
    """With zeros or points, and the parts of variants."""
    given, points = codes(bits, columns), torch.zeros(6, -(-columns // 64), dtype=torch.uint8)
    order, scale = torch.arange(columns).int(), torch.ones(columns).half()
    given.check(CPU)
    given._replace(scales=given.scales.float(), zeros=given.zeros.float()).check(CPU)  # trained
    given._replace(zeros=None, points=points, order=order, channel_scale=scale).check(CPU)
    given._replace(scales=torch.ones(6, 9).half(), zeros=torch.ones(6, 9).half(), groups=order).check(CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "codes of 5 bits"),
        ({"high": None}, "codes of 3 bits, without high"),
        ({"zeros": None}, "expected either zeros or points"),
        ({"points": torch.zeros(6, 2, dtype=torch.uint8)}, "expected either zeros or points"),
        ({"group": 128}, "2 groups of 128 in rows of 100"),
        ({"codes": torch.zeros(6, 24, dtype=torch.uint8)}, r"codes is torch.uint8 \[6, 24\].*expected .* \[6, 25\]"),
        ({"codes": torch.zeros(25, 6, dtype=torch.uint8).t()}, "codes is .* strides"),
        ({"scales": torch.ones(6, 2).bfloat16()}, "scales is torch.bfloat16"),
        ({"order": torch.arange(100)}, r"order is torch.int64 \[100\].*expected torch.int32 \[100\]"),
        ({"channel_scale": torch.ones(100)}, "channel_scale is torch.float32"),
    ],
)
def test_what_does_not(change: dict, message: str) -> None:
    """The part is named, and what was expected of it."""
    with pytest.raises(AssertionError, match=message):
        codes()._replace(**change).check(CPU)
