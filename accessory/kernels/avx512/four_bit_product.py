"""Products in bf16 with matrices of 4-bit codes: see `Products`."""

from __future__ import annotations

from accessory.kernels.avx512.four_bit_matrix import Packed, packed, takes
from accessory.kernels.avx512.packed_products import Products
from accessory.kernels.codes import Codes

_products: Products[Codes] = Products("four_bit_product", Packed, packed)
sum_of_products = _products.sum_of_products
workspace_bytes = _products.workspace_bytes

__all__ = ["sum_of_products", "takes", "workspace_bytes"]
