"""llm_int8: products in integers, but for columns of x that hold outliers, as in LLM.int8() (Dettmers et al. 2022).

Weights are stored as in int8. Each row of x is rounded to 8 bits too, which a few large values would spoil: columns
that hold one are multiplied in x's dtype instead. Which columns these are is decided over all rows that are multiplied
together, so a document's numbers depend a little on what it is packed with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.quant.int8 import LARGEST, SMALLEST, Int8Weight

THRESHOLD = 6.0
"""A magnitude from which on a value of x is an outlier."""
_PIECES = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Numbers of x, or of the result, that are worked on at a time."""
_FEWEST_ROWS, _MULTIPLE = 17, 8  # of a product in integers on CUDA


class LlmInt8(Int8Weight):
    """W [N, K] as in `Int8Weight`; x W^T = (codes of x) codes^T * scales of both / 127^2 + (outliers of x) W^T.

    The gradient of x goes through W as it is stored, as if x had not been rounded.
    """

    name, waits = "llm_int8", True

    def add_product(self, y: Tensor | None, x: Tensor) -> Tensor:
        """See `PackedWeight`; in fp32 (float64 for such an x) up to the outliers, which are added last."""
        columns, out = outlier_columns(x), x.new_empty(len(x), self.shape[0])
        wide = torch.promote_types(x.dtype, torch.float32)
        weight_scales = self.scales.to(wide) / LARGEST
        rows = self._rows_at_a_time(len(x), x.device)
        for top in range(0, len(x), rows):
            codes, scales = quantized_rows(x[top : top + rows], columns)
            part = _integer_product(codes, self.codes).to(wide)
            part.mul_((scales / LARGEST)[:, None]).mul_(weight_scales)
            if y is not None:
                part.add_(y if y.dim() == 1 else y[top : top + rows])
            out[top : top + rows] = part
        if len(columns):
            weights = self.codes[:, columns] * weight_scales[:, None]
            out.addmm_(x[:, columns], weights.to(x.dtype).t())
        return out

    def product_bytes(self, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
        """See `PackedWeight`. Outliers, whose number is not known before, take none of it."""
        (n, k), wide = self.shape, torch.promote_types(dtype, torch.float32).itemsize
        at_once = self._rows_at_a_time(rows, device)
        return at_once * max((2 * wide + 1) * k, k + (4 + wide) * n), 0

    def _rows_at_a_time(self, rows: int, device: torch.device) -> int:
        return max(min(rows, _PIECES[device.type] // max(self.shape)), 1)


def outlier_columns(x: Tensor) -> Tensor:
    """x [T, K] -> the columns that hold a magnitude of `THRESHOLD` or more, int64."""
    if not len(x):
        return torch.empty(0, dtype=torch.int64, device=x.device)
    return ((x.amax(0) >= THRESHOLD) | (x.amin(0) <= -THRESHOLD)).nonzero()[:, 0]


def quantized_rows(x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> codes int8 [T, K], zero in `columns`, and scales [T], the largest magnitudes but for outliers."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    wide.masked_fill_(wide.abs() >= THRESHOLD, 0)
    scales = torch.linalg.vector_norm(wide, float("inf"), dim=1)
    wide.mul_((LARGEST / scales.clamp_min(SMALLEST))[:, None])
    return wide.round_().to(torch.int8).index_fill_(1, columns, 0), scales


def _integer_product(a: Tensor, b: Tensor) -> Tensor:
    """int8 a [T, K] and b [N, K] -> a b^T [T, N]: int32, or fp32 where a GPU has no product of such a shape."""
    if a.device.type == "cpu":
        return torch._int_mm(a, b.t())
    if a.shape[1] % _MULTIPLE or len(b) % _MULTIPLE:
        return a.float() @ b.float().t()
    padding = max(_FEWEST_ROWS - len(a), 0)
    return torch._int_mm(torch.nn.functional.pad(a, (0, 0, 0, padding)), b.t())[: len(a)]
