"""What every storage format of a frozen matrix offers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from accessory.quant.addition import Addition

Low = tuple[Tensor, Tensor, float]
"""A product of low rank added to one with W^T: (x [T, R] in its dtype, factor [N, R] in any, scale) add scale * x
factor^T. To one with W: factor is [R, K], and not transposed either."""


class PackedWeight(nn.Module, ABC):
    """A frozen matrix W [N, K] kept in fewer bits. Who multiplies with it unpacks it each time, or a kernel of it does.

    Subclasses keep their codes and statistics as frozen parameters, so that data parallelism can shard them, and
    know no process group: under tensor parallelism W is this rank's slice.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = torch.Size(shape)

    @abstractmethod
    def pack(self, weight: Tensor) -> None:
        """Fill the codes and statistics from `weight` [N, K] in any float dtype, on the device where it lies."""

    @abstractmethod
    def adopt(self, state: dict[str, Tensor]) -> None:
        """Take codes and statistics, by parameter name, that were packed before."""

    @abstractmethod
    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K] in `dtype`, as the codes and statistics say."""

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and statistics; equal on the meta device and on a real one."""
        return sum(p.numel() * p.element_size() for p in self.parameters())

    def borrow(self, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K] in `dtype`, to multiply with at once: one that is borrowed later may overwrite it."""
        return self.unpack(dtype)

    @staticmethod
    def fused_sum(
        factors: list[Tensor],
        weights: list[PackedWeight],
        *,
        transposed: bool,
        bias: Tensor | None,
        low: Low | None,
    ) -> Tensor | None:
        """Sum of the products of `factors` with matrices of this format, x W^T (dy W if `transposed`), of bias and low.

        By one kernel; None where there is none for them: who asked borrows the matrices (`accessory.quant.products`).
        """
        return None

    @staticmethod
    def fused_bytes(
        weights: list[PackedWeight], rank: int, rows: int, *, transposed: bool, dtype: torch.dtype, device: torch.device
    ) -> int | None:
        """What that kernel keeps to work in, for factors of so many rows and a low term of `rank`; None likewise."""
        return None

    def prepare_decoding(self, others: list[PackedWeight]) -> None:
        """Make what `decode` needs to multiply with this matrix and these others, where there is something for it.

        It is gone when the module is to train or is filled anew.
        """

    def decode(self, x: Tensor, others: list[PackedWeight], additions: list[Addition]) -> tuple[Tensor, ...] | None:
        """x [T, K], few rows -> [T, N] of this matrix and of `others`: x W^T and its addition, without a gradient.

        None where they were not prepared together, or not for such an x.
        """
        return None

    def extra_repr(self) -> str:
        """The logical shape, for `print(model)`."""
        return f"{tuple(self.shape)}"
