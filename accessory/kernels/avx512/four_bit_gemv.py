"""Products of few rows in bf16 with matrices of 4-bit codes, with their biases and LoRA."""

from __future__ import annotations

from accessory.kernels.avx512.four_bit_matrix import packed, takes
from accessory.kernels.avx512.packed_gemv import MOST_ROWS, PackedMatrices
from accessory.kernels.codes import Codes


class Matrices(PackedMatrices[Codes]):
    """See `PackedMatrices`. The 16 code values are rounded to bf16, scales are not."""

    NAME, IN_C = "four_bit_gemv", staticmethod(packed)


__all__ = ["MOST_ROWS", "Matrices", "takes"]
