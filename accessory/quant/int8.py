"""int8: a code of eight bits for each weight and a scale for each row, as in LLM.int8() (Dettmers et al. 2022).

That paper's outlier columns and 8-bit activations are for products in integers (`accessory.quant.llm_int8`); here only
weights are rounded and products stay in the activations' dtype, so outliers need no columns of their own.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from accessory.quant.packed import PackedWeight, Part

LARGEST = 127  # code; -128 is not used, so that codes are symmetric
CPU_PIECE = 1 << 18  # weights quantized at a time
SMALLEST = 1e-36  # a row's scale for quantizing is no smaller, because 127 / scale would overflow


class Int8Weight(PackedWeight):
    """W [N, K] = codes * (scales / 127), multiplied in fp32 and then rounded to the dtype asked for.

    Parts: `codes` int8 [N, K], and `scales` fp32 [N], the largest magnitude of each row. A weight is off by at most
    scales / 254, half a step (and the rounding of fp32).
    """

    name, bits = "int8", 8
    PARTS: ClassVar = {"codes": Part(torch.int8), "scales": Part(torch.float32, None)}

    @torch.no_grad()
    def pack(self, weight: Tensor) -> None:
        """Quantize `weight` [N, K] on its own device: codes = round(weight * (127 / scales)), of fp32, ties to even.

        A row's result does not depend on other rows, so slices by rows are slices of the whole result. Slices by
        columns get scales of their own, which are no larger than the whole row's.
        """
        rows = max(CPU_PIECE // weight.shape[1], 1) if weight.device.type == "cpu" else len(weight)
        packed = [_quantized(part.float()) for part in weight.split(rows)]
        codes, scales = (torch.cat(parts) for parts in zip(*packed, strict=True))
        self.adopt({"codes": codes, "scales": scales})

    @classmethod
    def used_for(cls, packed: type[PackedWeight]) -> type[PackedWeight] | None:
        """See `PackedWeight`: formats with the same parts differ in products alone."""
        return cls if issubclass(packed, Int8Weight) else None

    @torch.no_grad()
    def unpack_into(self, out: Tensor) -> Tensor:
        """See `PackedWeight`."""
        return torch.mul(self.codes, (self.scales / LARGEST)[:, None], out=out)


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [N, K] -> codes int8 [N, K], scales [N]; rows of zeros have a scale of zero."""
    scales = weight.abs().amax(1)
    steps = LARGEST / scales.clamp_min(SMALLEST)
    return (weight * steps[:, None]).round_().to(torch.int8), scales
