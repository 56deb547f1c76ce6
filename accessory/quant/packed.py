"""What every storage format of a frozen matrix offers, and the one product that trains through it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class PackedWeight(nn.Module, ABC):
    """A frozen matrix W [N, K] kept in fewer bits. Calling it multiplies: x [T, K] -> x W^T [T, N].

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

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> x W^T [T, N], both in x's dtype."""
        return FrozenProduct.apply(x, self)

    def extra_repr(self) -> str:
        """The logical shape, for `print(model)`."""
        return f"{tuple(self.shape)}"


class FrozenProduct(torch.autograd.Function):
    """y = x W^T for a frozen packed W. Nothing is saved: the backward needs only W, unpacked again.

    The module rather than its tensors is held for the backward, because a sharded base is gathered into other memory
    by then.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: PackedWeight) -> Tensor:
        """x [T, K] -> y [T, N]."""
        ctx.weight = weight
        return x @ weight.unpack(x.dtype).t()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        """dy [T, N] -> dx [T, K]; there is no weight gradient to form."""
        return dy @ ctx.weight.unpack(dy.dtype), None
