"""Products of one x with several matrices of 4-bit codes, with their biases and LoRA."""

from __future__ import annotations

from torch import Tensor

from accessory.kernels.codes import BiasAndLora, Codes
from accessory.kernels.plain.four_bit_product import sum_of_products


class Matrices:
    """Several W [n, k] that multiply the same x [T, k]."""

    def __init__(self, matrices: list[Codes]) -> None:
        self._matrices = matrices

    def multiply(self, x: Tensor, added: list[BiasAndLora] | None = None) -> tuple[Tensor, ...]:
        """x [T, k] -> [T, n] for each matrix, with its bias and LoRA."""
        found = []
        for codes, one in zip(self._matrices, added or [BiasAndLora()] * len(self._matrices), strict=True):
            low = None if one.a is None else (x @ one.a.to(x.dtype).t(), one.b, one.scale)
            found.append(sum_of_products([x], [codes], transposed=False, bias=one.bias, low=low))
        return tuple(found)
