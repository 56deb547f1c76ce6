"""Adam's moments in 8 bits: codes of bitsandbytes' dynamic data types, with a scale for each block of 256 values.

Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization". Blocks run through a tensor as it lies in memory.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from accessory.kernels.bitsandbytes_library import functional as bnb

BLOCK = 256


@cache
def levels(signed: bool, device: torch.device) -> Tensor:
    """Values [256] of the codes in units of the block's scale, fp32, ascending; unsigned for the second moment."""
    return bnb.create_dynamic_map(signed=signed).to(device)


def zero_code(signed: bool) -> int:
    """The code of 0."""
    return int((levels(signed, torch.device("cpu")) == 0).nonzero())


def pack_moment(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """fp32 values -> (uint8 codes of the same shape, fp32 scales [blocks])."""
    if not values.numel():
        return values.to(torch.uint8), values.new_zeros(0)
    table = levels(signed, values.device)
    return torch.ops.bitsandbytes.quantize_blockwise(values.contiguous(), table, BLOCK)


def unpack_moment(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """(uint8 codes, fp32 scales [blocks]) -> fp32 values of the codes' shape."""
    if not codes.numel():
        return codes.to(torch.float32)
    table = levels(signed, codes.device)
    return torch.ops.bitsandbytes.dequantize_blockwise(codes.contiguous(), scales, table, BLOCK, torch.float32)
