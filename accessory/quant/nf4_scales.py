"""nf4_scales: NF4 whose scales are trained, as in PEQA (Kim et al. 2023): weights stay 4-bit in training."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from accessory.errors import ConfigError
from accessory.quant.four_bit import BLOCK, FlatPart, Nf4Single
from accessory.quant.packed import WHOLE, PackedState, Part, Span, frozen

PIECE = 1 << 22  # weights whose gradient is made at a time


class Nf4Scales(Nf4Single):
    """W [N, K] = codebook[codes] * scales: `codes` uint8 [N*K/2], frozen; `scales` fp32 [N, K/64], trained."""

    name = "nf4_scales"
    PARTS: ClassVar = {"codes": FlatPart(torch.uint8, 2), "scales": Part(torch.float32, BLOCK, trained=True)}

    def __init__(self, shape: tuple[int, int]) -> None:
        if shape[1] % BLOCK:
            raise ConfigError(
                f"--quant_type {self.name}: a matrix of {shape[1]} columns is no whole blocks of {BLOCK}, each with "
                "a scale of its own. Give a smaller --model_parallel_size, or --quant_type nf4."
            )
        super().__init__(shape)

    @classmethod
    def cut(
        cls, state: PackedState, columns: int, name: str, rows: Tensor | None = None, span: Span = WHOLE
    ) -> PackedState:
        """See `PackedWeight`."""
        width = span[2] - span[1] if span[0] == 1 else columns
        state = super().cut(state, columns, name, rows, span)
        return state | {"scales": state["scales"].view(-1, width // BLOCK)}

    @classmethod
    def reads_bitsandbytes(cls, state: dict[str, Any]) -> bool:
        """Such files are nf4_single."""
        return False

    def pack(self, weight: Tensor) -> None:
        """See `PackedWeight`."""
        super().pack(weight)
        self.scales = frozen(self.scales.view(len(weight), -1))

    @torch.no_grad()
    def gradients(self, x: Tensor, dy: Tensor) -> list[Tensor]:
        """Of `scales`: sums over blocks of dW * codebook[codes], where dW = dy^T x is made some rows at a time."""
        (n, k), found = self.shape, torch.empty_like(self.scales)
        codes, step = self.codes.view(n, k // 2), max(PIECE // k, 1)
        for top in range(0, n, step):
            dw = dy[:, top : top + step].t() @ x
            unscaled = Nf4Single(tuple(dw.shape))
            ones = found.new_ones(dw.numel() // BLOCK)
            unscaled.adopt({"codes": codes[top : top + step].reshape(-1), "scales": ones})
            of_codes = dw * unscaled.unpack(torch.float32)
            found[top : top + step] = of_codes.view(-1, k // BLOCK, BLOCK).sum(-1)
        return [found]

    def gradients_bytes(self, dtype: torch.dtype) -> int:
        """A piece of dW, of its codes' values, and of their product."""
        return min(self.shape.numel(), PIECE) * (dtype.itemsize + 4 + 4)


Nf4Scales.single = Nf4Scales
