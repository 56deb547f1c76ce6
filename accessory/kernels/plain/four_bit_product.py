"""Products with matrices of 4-bit codes, each of which is unpacked whole."""

from __future__ import annotations

from torch import Tensor

from accessory.kernels.codes import Codes
from accessory.kernels.plain import four_bit, products


def sum_of_products(
    factors: list[Tensor],
    matrices: list[Codes],
    *,
    transposed: bool,
    bias: Tensor | None = None,
    low: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """As `accessory.kernels.plain.products.sum_of_products`."""
    weights = (four_bit.dequantize(codes, factors[0].dtype) for codes in matrices)
    return products.sum_of_products(factors, weights, transposed=transposed, bias=bias, low=low)
