"""A copy of a 4-bit matrix to decode with: bitsandbytes' product that unpacks in registers, on CPUs with bf16 products.

It reads another layout than the one that is stored, and scales in bf16. Its module `Linear4bit` rewrites the weights to
that in place when it is first asked in eval mode, and what it saves then is no longer what was loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.quant import native

MOST_ROWS = 48  # of x; for more, unpacking the matrix once and multiplying plainly is as fast


@dataclass(frozen=True)
class FusedCopy:
    """W [N, K] for `multiply`. codes: uint8 [N, K/2]; scales: bf16 [K/block, N].

    A byte holds one column's codes of two rows, 16 rows apart, and a row of bytes 32 rows of two columns. A product
    rounds the 16 code values and the scales to bf16, sums in fp32 and scales the sum: its error is up to a quarter
    larger than that of a product with weights rounded to bf16, and a row comes out the same bits whatever rows it is
    among.
    """

    codes: Tensor
    scales: Tensor
    block: int
    quant_type: str

    @staticmethod
    def of(codes: Tensor, scales: Tensor, shape: tuple[int, int], block: int, quant_type: str) -> FusedCopy | None:
        """From codes [N*K/2], high nibble first, and fp32 scales [N*K/block]; None where the product does not exist."""
        n, k = shape
        if not (native.FUSES and codes.is_cpu and n % native.FUSED_ROWS == 0 and k % native.FUSED_COLUMNS == 0):
            return None
        half = native.FUSED_ROWS // 2
        first, second = codes.view(-1, 2, half, k // 2).unbind(1)
        laid_out = torch.empty(n // native.FUSED_ROWS, k // 2, half, 2, dtype=torch.uint8)
        even, odd = laid_out.transpose(1, 2).unbind(-1)
        even.copy_((first >> 4) | (second & 0xF0))
        odd.copy_((first & 0x0F) | (second << 4))
        return FusedCopy(laid_out.view(n, -1), scales.view(n, -1).t().bfloat16().contiguous(), block, quant_type)

    @staticmethod
    def joined(copies: list[FusedCopy]) -> FusedCopy:
        """Of matrices with as many columns, one under the other."""
        codes, scales = torch.cat([c.codes for c in copies]), torch.cat([c.scales for c in copies], 1)
        return FusedCopy(codes, scales, copies[0].block, copies[0].quant_type)

    def takes(self, x: Tensor) -> bool:
        """Whether to multiply x [T, K] by this copy."""
        return x.is_cpu and x.dtype == torch.bfloat16 and x.shape[0] <= MOST_ROWS

    def multiply(self, x: Tensor) -> Tensor:
        """x [T, K] bf16 -> x W^T [T, N] bf16."""
        return native.fused_product(x, self.codes, self.scales, self.block, self.quant_type)
