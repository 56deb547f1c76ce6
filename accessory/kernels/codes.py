"""Matrices of codes of four bits and fewer as kernels take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64  # weights that share a scale
NESTED_BLOCK = 256  # scales that share one of their own


class Codes(NamedTuple):
    """W [n, k]: codes uint8 [n k / 2], high nibble first, into `codebook` fp32 [16], and a scale for each 64.

    scales: fp32 [n k / 64], or, with `nested`, uint8: `nested_codebook[scales] * nested_scales + offset`.
    nested: (nested_codebook [256], nested_scales, one for each 256 scales, offset [1]), fp32. quant_type: the
    codebook's name in bitsandbytes, nf4 or fp4.
    """

    shape: tuple[int, int]
    codes: Tensor
    codebook: Tensor
    scales: Tensor
    nested: tuple[Tensor, Tensor, Tensor] | None
    quant_type: str = "nf4"

    def check(self, device: torch.device) -> None:
        """Raises `AssertionError` for a part that is not as above, or not contiguous on `device`."""
        numel = self.shape[0] * self.shape[1]
        blocks, numbers = -(-numel // BLOCK), torch.float32
        expected = [("codes", self.codes, torch.uint8, numel // 2), ("codebook", self.codebook, numbers, 16)]
        expected.append(("scales", self.scales, torch.uint8 if self.nested else numbers, blocks))
        if self.nested:
            nested_codebook, nested_scales, offset = self.nested
            expected += [("nested_codebook", nested_codebook, numbers, 256), ("offset", offset, numbers, 1)]
            expected.append(("nested_scales", nested_scales, numbers, -(-blocks // NESTED_BLOCK)))
        for name, part, dtype, size in expected:
            if (part.dtype, part.shape, part.device) != (dtype, (size,), device) or not part.is_contiguous():
                found = f"{part.dtype} {list(part.shape)} on {part.device}, strides {part.stride()}"
                raise AssertionError(f"{name} is {found}; expected {dtype} [{size}] on {device}, contiguous")


class GroupCodes(NamedTuple):
    """W [n, k] as whole numbers q of 2, 3 or 4 bits, with a scale for each `group` of columns.

    w[:, j] = q[:, j] * scales[:, j // group] - zeros[:, j // group], or (q - points) * scales, in fp32. The last group
    of a row may be shorter: there are G = ceil(k / group).

    codes: uint8. 4 bits: [n, ceil(k / 2)], column j in bits 4 (j % 2) and up of byte j // 2. 2 bits:
    [n, ceil(k / 4)], column j in bits 2 (j % 4) and up of byte j // 4; 3 bits: the same for the lower two, and `high`
    uint8 [n, ceil(k / 8)] has the third, in bit j % 8 of byte j // 8. Bits past the last column mean nothing.
    scales, zeros: fp16 [n, G], or fp32 where they are trained. points: uint8 [n, G], instead of zeros.
    order: int32 [k]; column j stands for channel order[j] of x. Without it they are the same.
    channel_scale: fp16 [k]; channel i of x is multiplied by channel_scale[i] first.
    groups: int32 [k], the group of each column where that is not j // group.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    codes: Tensor
    high: Tensor | None
    scales: Tensor
    zeros: Tensor | None
    points: Tensor | None = None
    order: Tensor | None = None
    channel_scale: Tensor | None = None
    groups: Tensor | None = None

    def check(self, device: torch.device) -> None:
        """Raises `AssertionError` for a part that is missing, not as above, or not contiguous on `device`."""
        (n, k), statistics = self.shape, (self.shape[0], self.scales.shape[-1])
        narrow = (torch.float16, torch.float32)
        if self.groups is None and statistics[1] != -(-k // self.group):
            raise AssertionError(f"{statistics[1]} groups of {self.group} in rows of {k}")
        expected = {
            "codes": ((torch.uint8,), (n, -(-k // (2 if self.bits == 4 else 4)))),
            "high": ((torch.uint8,), (n, -(-k // 8))),
            "scales": (narrow, statistics),
            "zeros": (narrow, statistics),
            "points": ((torch.uint8,), statistics),
            "order": ((torch.int32,), (k,)),
            "channel_scale": ((torch.float16,), (k,)),
            "groups": ((torch.int32,), (k,)),
        }
        if self.bits not in (2, 3, 4) or (self.high is None) == (self.bits == 3):
            raise AssertionError(f"codes of {self.bits} bits, {'without' if self.high is None else 'with'} high")
        if (self.zeros is None) == (self.points is None):
            raise AssertionError("expected either zeros or points")
        for name, (dtypes, shape) in expected.items():
            part = getattr(self, name)
            if part is None:
                continue
            if part.dtype not in dtypes or (part.shape, part.device) != (shape, device) or not part.is_contiguous():
                found = f"{part.dtype} {list(part.shape)} on {part.device}, strides {part.stride()}"
                raise AssertionError(f"{name} is {found}; expected {dtypes[0]} {list(shape)} on {device}, contiguous")


def whole_numbers(codes: Tensor, high: Tensor | None, bits: int, columns: int) -> Tensor:
    """The codes of rows, as `GroupCodes` has them, one by one: uint8 [n, columns]."""
    width = 4 if bits == 4 else 2
    places = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
    numbers = (codes[:, :, None] >> places).bitwise_and_((1 << width) - 1).flatten(1)[:, :columns]
    if high is not None:
        third = (high[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=codes.device)).bitwise_and_(1)
        numbers = numbers + third.flatten(1)[:, :columns] * 4
    return numbers
