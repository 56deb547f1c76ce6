"""Products of few rows with several matrices in one call of a kernel, while decoding."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from accessory import kernels
from accessory.kernels.addition import Addition
from accessory.kernels.avx512.packed_gemv import PackedMatrices
from accessory.kernels.few_rows import JoinedGroups, JoinedMatrices
from accessory.quant.packed import PackedState, PackedWeight


class FewRowsWeight(PackedWeight):
    """A storage with such a kernel, where the machine has it; storages of the same kernel are multiplied together."""

    FEW_ROWS: ClassVar[str]
    """The kernel's name."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self.prepared: PackedMatrices | JoinedMatrices | JoinedGroups | None = None
        self.prepared_with: list[PackedWeight] = []

    @abstractmethod
    def kernel_case(self) -> Any:
        """What the kernel's `takes` is asked about this matrix."""

    @staticmethod
    @abstractmethod
    def joined(weights: list[FewRowsWeight]) -> JoinedMatrices | JoinedGroups | None:
        """On a GPU, the products of matrices that one kernel takes; None: they are unpacked."""

    def decoded_codes(self) -> Any:
        """The matrix as the kernel gets it."""
        return self.as_codes()

    def decode_products(self, x: Tensor, others: list[PackedWeight], additions: list[Addition]) -> tuple | None:
        """See `PackedWeight`: one call of the AVX512 kernel, or one launch or a few."""
        if self.prepared is None or not self.prepared.takes(x) or self.prepared_with != others:
            return None
        # Empty additions are not passed: while decoding, converting them takes longer than the arithmetic.
        there = any(addition.bias is not None or addition.a is not None for addition in additions)
        return self.prepared.multiply(x, additions if there else None)

    @torch.no_grad()
    def prepare_decoding(self, others: list[PackedWeight]) -> None:
        """See `PackedWeight`: keep all addresses, if the AVX512 kernel can be used, or what a GPU's kernels take.

        On a GPU, what is prepared stays in place, because recorded work reads it there.
        """
        weights = [self, *others]
        if not all(isinstance(w, FewRowsWeight) and w.FEW_ROWS == self.FEW_ROWS for w in weights):
            return
        if self.codes.is_cuda:
            if self.prepared is None or self.prepared_with != others:
                self.prepared, self.prepared_with = self.joined(weights), others
            else:
                self.prepared.forget_trained()
            return
        cases = (weight.kernel_case() for weight in weights)
        if kernel := kernels.fast(self.FEW_ROWS, self.codes.device, torch.bfloat16, *cases):
            self.prepared, self.prepared_with = kernel.Matrices([w.decoded_codes() for w in weights]), others

    def adopt(self, state: PackedState) -> None:
        """See `PackedWeight`; addresses of the former parts are forgotten."""
        self.prepared = None
        super().adopt(state)

    def train(self, mode: bool = True) -> FewRowsWeight:
        """As every module's; training discards the addresses."""
        self.prepared = None if mode else self.prepared
        return super().train(mode)
