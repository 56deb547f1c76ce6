"""Products in bf16 with matrices of 2, 3 and 4-bit codes in groups, of several widths too: see `Products`."""

from __future__ import annotations

from accessory.kernels.avx512.group_codes_matrix import InC, in_c, takes
from accessory.kernels.avx512.packed_products import Products
from accessory.kernels.codes import GroupCodes

_products: Products[GroupCodes] = Products("group_codes_product", InC, in_c)
sum_of_products = _products.sum_of_products
workspace_bytes = _products.workspace_bytes

__all__ = ["sum_of_products", "takes", "workspace_bytes"]
