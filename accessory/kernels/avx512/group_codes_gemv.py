"""Products of few rows in bf16 with matrices of 2, 3 and 4-bit codes in groups, with their biases and LoRA."""

from __future__ import annotations

from accessory.kernels.avx512.group_codes_matrix import in_c, takes
from accessory.kernels.avx512.packed_gemv import MOST_ROWS, PackedMatrices
from accessory.kernels.codes import GroupCodes


class Matrices(PackedMatrices[GroupCodes]):
    """See `PackedMatrices`: of any widths and groups together. No weight is rounded."""

    NAME, IN_C = "group_codes_gemv", staticmethod(in_c)


__all__ = ["MOST_ROWS", "Matrices", "takes"]
