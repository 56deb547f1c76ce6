"""NF4 and FP4: blocks of 64 weights, a 4-bit code each, one scale a block, and optionally 8-bit scales of scales.

The formats are those of QLoRA (Dettmers et al. 2023, sections 2 and 3), computed by bitsandbytes' functional
operations; the packed tensors are ours, because its modules repack and re-cast weights behind the caller's back.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor, nn

from accessory.quant.packed import PackedWeight

# On a CPU bitsandbytes complains at import that an optional kernel, which nothing here calls, is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
import bitsandbytes.functional as bnb  # noqa: E402

BLOCK = 64  # weights that share one scale
NESTED_BLOCK = 256  # scales that share one scale of their own; fixed in bitsandbytes


@lru_cache
def nested_codebook(device: torch.device) -> Tensor:
    """The 256 values [256] fp32 an 8-bit scale can take; shared by every weight on `device`."""
    return bnb.create_dynamic_map().to(device)


class FourBitWeight(PackedWeight):
    """W [N, K] as 4-bit codes, high nibble first, row-major blocks of 64.

    Parameters (frozen): `codes` uint8 [N*K/2] and `scales`, fp32 [N*K/64] when single-level. Double-quantized
    (`nested`), `scales` is uint8 and decodes as `nested_codebook[scales] * nested_scales + offset`, with
    `nested_scales` fp32 [N*K/64/256] and `offset` fp32 [1].
    """

    def __init__(self, shape: tuple[int, int], *, quant_type: str = "nf4", nested: bool = True) -> None:
        super().__init__(shape)
        if shape[1] % 2:
            raise AssertionError(f"4-bit rows hold pairs of weights; got {shape[1]} columns")
        self.quant_type, self.nested = quant_type, nested
        numel = shape[0] * shape[1]
        blocks = -(-numel // BLOCK)
        self.codes = _frozen(torch.empty(numel // 2, dtype=torch.uint8, device="meta"))
        self.scales = _frozen(torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32, device="meta"))
        if nested:
            self.nested_scales = _frozen(torch.empty(-(-blocks // NESTED_BLOCK), device="meta"))
            self.offset = _frozen(torch.empty(1, device="meta"))

    @torch.no_grad()
    def pack(self, weight: Tensor) -> None:
        """Quantize `weight` [N, K] on its own device."""
        codes, state = bnb.quantize_4bit(
            weight, blocksize=BLOCK, compress_statistics=self.nested, quant_type=self.quant_type
        )
        self.codes, self.scales = _frozen(codes.view(-1)), _frozen(state.absmax)
        if self.nested:
            self.nested_scales = _frozen(state.state2.absmax)
            self.offset = _frozen(state.offset.view(1))

    @torch.no_grad()
    def unpack(self, dtype: torch.dtype) -> Tensor:
        """Dequantize to [N, K] in `dtype`."""
        scales = self.scales
        if self.nested:
            codebook = nested_codebook(scales.device)
            scales = torch.ops.bitsandbytes.dequantize_blockwise.default(
                scales, self.nested_scales, codebook, NESTED_BLOCK, torch.float32
            ).add_(self.offset)
        return torch.ops.bitsandbytes.dequantize_4bit.default(
            self.codes.view(-1, 1), scales, BLOCK, self.quant_type, self.shape, dtype
        )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
