"""Matrices of 4-bit codes as kernels take them."""

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
