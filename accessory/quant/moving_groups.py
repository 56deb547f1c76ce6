"""Codes in groups whose whole numbers move by ones while they are trained, as `accessory.run.integer_moves` says.

What a whole number would have to become is kept at a low rank, as GaLore (Zhao et al. 2024) keeps Adam's moments: what
is wished of a matrix W [N, K] is a displacement, unit U basis^T with U [N, R] and an orthonormal basis [K, R] for the
columns, or unit basis U with U [R, K] and a basis [N, R] for the rows. U is trained as any fp32 parameter is, and so
is clipped, accumulated, sharded and summed over ranks as they are. dW is never formed for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from accessory.errors import ParallelError
from accessory.quant.groups import GroupWeight
from accessory.quant.packed import PackedState, PackedWeight, Span, frozen
from accessory.quant.trained_groups import with_trained_statistics

WISH, BASIS = "displacement", "basis"


@dataclass
class Sketch:
    """dW^T test [K, R], or dW test [N, R], fp32, summed over backwards: its columns span a new basis.

    draw: makes the test matrix [N, R], or [K, R], the same each time: many of them would take much memory.
    """

    draw: Callable[[], Tensor]
    total: Tensor | float = 0.0

    def add(self, x: Tensor, dy: Tensor, of_columns: bool) -> None:
        """Add what one backward saw, x [T, K] and dy [T, N]. of_columns: whether the basis is for the columns of W."""
        near, far = (dy, x) if of_columns else (x, dy)
        self.total = self.total + (far.t() @ (near @ self.draw().to(near.dtype))).float()


@dataclass
class Wish:
    """How a matrix keeps what its whole numbers would have to become. scale: of displacements, in steps of its grid."""

    rank: int
    of_columns: bool
    scale: float
    sketch: Sketch | None = field(default=None, repr=False)


class MovingIntegers(GroupWeight):
    """Codes that training changes; with a `wish`, what only training needs is there: `displacement` (U) and `basis`."""

    wish: Wish | None = None
    step_size: float = 1.0
    statistics: ClassVar[tuple[str, ...]] = ()
    """Parts that are trained beside the whole numbers."""

    @classmethod
    def of_range(cls, columns: int, span: Span) -> type[PackedWeight]:
        """See `PackedWeight`. Raises `ParallelError` for columns in an order of their own, whose codes cannot be put
        together again.
        """
        if span[0] == 1 and span[2] - span[1] < columns and cls.has("order"):
            raise ParallelError(
                f"--model_parallel_size {columns // (span[2] - span[1])} cuts rows of {columns} weights, which lie in "
                f"an order of their own, packed as {cls.name}: their whole numbers cannot be trained so. Give 1."
            )
        return super().of_range(columns, span)

    def keep_wish(self, wish: Wish) -> None:
        """Add what training needs, on the device of the codes."""
        rows, columns = self.shape
        wish.rank = min(wish.rank, columns if wish.of_columns else rows)
        self.wish, self.trained = wish, (*self.statistics, WISH)
        self._make_wish()

    def _make_wish(self) -> None:
        (rows, columns), rank, device = self.shape, self.wish.rank, self.codes.device
        shape = (rows, rank) if self.wish.of_columns else (rank, columns)
        self.register_parameter(WISH, nn.Parameter(torch.zeros(shape, device=device)))
        shape = (columns if self.wish.of_columns else rows, rank)
        self.register_parameter(BASIS, frozen(torch.zeros(shape, device=device)))

    def adopt(self, state: PackedState) -> None:
        """See `PackedWeight`."""
        super().adopt(state)
        self.step_size = float(state["scales"].float().abs().mean())
        if self.wish:
            self._make_wish()

    @property
    def unit(self) -> float:
        """A displacement of one, in the weights' units."""
        return self.step_size * self.wish.scale

    @torch.no_grad()
    def gradients(self, x: Tensor, dy: Tensor) -> list[Tensor]:
        """Of the trained statistics, and of U: dW basis, or basis^T dW, times the unit."""
        found = super().gradients(x, dy) if self.statistics else []
        x, basis = self.packed_input(x), self.basis.to(x.dtype)
        if self.wish.sketch:
            self.wish.sketch.add(x, dy, self.wish.of_columns)
        of_wish = dy.t() @ (x @ basis) if self.wish.of_columns else (dy @ basis).t() @ x
        return [*found, of_wish.float().mul_(self.unit)]

    def gradients_bytes(self, dtype: torch.dtype) -> int:
        """See `PackedWeight`."""
        of_wish = self.displacement.numel() * dtype.itemsize
        return max(super().gradients_bytes(dtype), of_wish) if self.statistics else of_wish


@lru_cache
def with_moving_integers(kind: type[GroupWeight], statistics: bool) -> type[MovingIntegers]:
    """The storage `kind` whose whole numbers move; statistics: its scales and zeros are trained, too."""
    base = with_trained_statistics(kind) if statistics else kind
    about = f"{kind.name} whose whole numbers {'and statistics ' * statistics}are trained."
    made = type(f"{base.__name__}Moving", (MovingIntegers, base), {"PARTS": base.PARTS, "__doc__": about})
    made.filed, made.statistics = base.filed, base.trained
    made.moved = tuple(part for part in ("codes", "high") if part in base.PARTS)
    return made
