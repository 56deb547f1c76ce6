"""Arguments of the decoding kernels: products of a few rows, each with what comes before and after it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from accessory.kernels.codes import BLOCK, Codes

MOST_ROWS = 16
"""The most documents that are computed together."""
LEAST_RANK = 16
"""A smaller LoRA rank is padded with zeros to this, a larger one to a power of two."""
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


class Products(NamedTuple):
    """One to three W [n, k] that multiply the same x [rows, k], one after the other; N is the sum of their n.

    matrices: all in codes of 4 bits, or all plain, in x's dtype.
    norm: fp32 [k]: x is first divided by its root mean square and multiplied by this; or [2, k], LayerNorm's weight and
    bias. eps: added to the mean square.
    b: LoRA's second factors [N, R] in x's dtype, scaled. What they multiply, x A^T, is given in parts (see `multiply`):
    of x before its norm, with A times the norm's weight. low_at: the first of its columns that is these matrices'.
    corrections: with LayerNorm, fp32 [2, R a matrix]: row sums of A times its weight, and products of A with its bias.
    bias: fp32 [N]. activation: of a single matrix's result; or two matrices are a gate and its other factor, and the
    result is act(first) * second.
    following: A of the linears that read the result [R', n] in x's dtype, times the weight of a norm between them.
    """

    matrices: tuple[Codes | Tensor, ...]
    norm: Tensor | None = None
    eps: float = 0.0
    b: Tensor | None = None
    bias: Tensor | None = None
    activation: str | None = None
    following: Tensor | None = None
    low_at: int = 0
    corrections: Tensor | None = None

    @property
    def widths(self) -> list[int]:
        """n of each matrix."""
        return [matrix.shape[0] for matrix in self.matrices]

    @property
    def columns(self) -> int:
        """k, the columns of each matrix."""
        return self.matrices[0].shape[1]

    @property
    def made(self) -> int:
        """Columns of the result."""
        return self.widths[0] if self.activation else sum(self.widths)

    @property
    def plain(self) -> bool:
        """Whether the matrices are in no code."""
        return isinstance(self.matrices[0], Tensor)

    @property
    def layer_norm(self) -> bool:
        """Whether the norm subtracts a mean."""
        return self.norm is not None and self.norm.dim() == 2

    @property
    def device(self) -> torch.device:
        """Where all parts lie."""
        first = self.matrices[0]
        return first.device if isinstance(first, Tensor) else first.codes.device

    def check(self, dtype: torch.dtype) -> None:
        """Raises `AssertionError` for what does not fit together, or to an x of `dtype`."""
        device = self.device
        if any(m.shape[1] != self.columns or m.shape[1] % BLOCK for m in self.matrices):
            raise AssertionError(
                f"matrices of {[tuple(m.shape) for m in self.matrices]}; expected as many whole blocks"
            )
        self._check_plain(dtype) if self.plain else self._check_codes()
        if self.activation and (
            self.activation not in ACTIVATIONS or self.widths not in (self.widths[:1], self.widths[:1] * 2)
        ):
            raise AssertionError(f"{self.activation} of {self.widths}")
        total, rank = sum(self.widths), 0 if self.b is None else self.b.shape[1]
        norm = (2, self.columns) if self.layer_norm else (self.columns,)
        expected = {
            "norm": norm, "bias": (total,), "b": (total, rank), "corrections": (2, rank * len(self.matrices)),
        }  # fmt: skip
        for name, shape in expected.items():
            part = getattr(self, name)
            if part is not None and (part.shape != shape or not part.is_contiguous() or part.device != device):
                raise AssertionError(f"{name} is {list(part.shape)} on {part.device}; expected {list(shape)}")
        if self.layer_norm and (self.b is None) != (self.corrections is None):
            raise AssertionError("LoRA behind LayerNorm needs corrections, and they need LoRA")
        for name, size in (("b", rank), ("following", 0 if self.following is None else len(self.following))):
            if size and (size < LEAST_RANK or size & (size - 1)):
                raise AssertionError(f"{name} of rank {size}; expected a power of two from {LEAST_RANK} on")

    def _check_plain(self, dtype: torch.dtype) -> None:
        for matrix in self.matrices:
            if not isinstance(matrix, Tensor) or matrix.dtype != dtype or not matrix.is_contiguous():
                raise AssertionError(f"a matrix beside plain ones; expected contiguous ones in {dtype}")

    def _check_codes(self) -> None:
        first = self.matrices[0]
        for matrix in self.matrices:
            if isinstance(matrix, Tensor):
                raise AssertionError("a plain matrix beside codes")
            matrix.check(self.device)
            if (matrix.nested is None) != (first.nested is None) or (
                first.nested and matrix.nested[0] is not first.nested[0]
            ):  # fmt: skip
                raise AssertionError("scales in other codebooks than the first matrix's")


class Attending(NamedTuple):
    """Attention of a new token to its document's cache.

    rotations: of all positions, complex64 [longest, half]. layout: of rotated channels, pairs or halves. window: how
    many tokens, up to its own, a token sees; all if absent. following: A of `wo` [R', H E] in q's dtype, if there is
    one. norms: weights of RMSNorms of each query and key before its rotation, fp32 [E]. eps: theirs.
    slopes: ALiBi's, fp32 [H]. beyond: what keys have in the cache behind their channels, at each position [longest, n]
    in q's dtype; values have zeros there.
    """

    heads: int
    kv_heads: int
    width: int
    rotations: Tensor
    layout: str
    scale: float
    window: int | None = None
    following: Tensor | None = None
    norms: tuple[Tensor, Tensor] | None = None
    eps: float = 0.0
    slopes: Tensor | None = None
    beyond: Tensor | None = None


def filled_up(rank: int) -> int:
    """The rank that kernels compute with for a LoRA of `rank`, or for several together."""
    return max(LEAST_RANK, 1 << (rank - 1).bit_length()) if rank else 0


__all__ = ["ACTIVATIONS", "LEAST_RANK", "MOST_ROWS", "Attending", "Products", "filled_up"]
