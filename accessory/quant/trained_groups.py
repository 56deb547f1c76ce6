"""Codes in groups whose scales and zeros are trained, as in PEQA (Kim et al. 2023); the codes stay."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from accessory.errors import ParallelError
from accessory.kernels.codes import whole_numbers
from accessory.quant.groups import GroupWeight, group_storage
from accessory.quant.packed import PackedState, PackedWeight, Span

STATISTICS = ("scales", "zeros")
PIECE = 1 << 20  # weights whose gradient is made at a time


class TrainedStatistics(GroupWeight):
    """Codes as they are, and `scales` and `zeros` [N, G] in fp32, trained.

    step_size: the mean distance of two neighbours on the grid, as the matrix came.
    """

    step_size: float = 1.0

    @classmethod
    def of_range(cls, columns: int, span: Span) -> type[PackedWeight]:
        """See `PackedWeight`. Raises `ParallelError` for a cut after which two ranks would train one scale."""
        if span[0] == 1 and span[2] - span[1] < columns and (cls.has("order") or (span[2] - span[1]) % cls.group):
            order = ", which lie in an order of their own," if cls.has("order") else ""
            raise ParallelError(
                f"--model_parallel_size {columns // (span[2] - span[1])} cuts rows of {columns} weights{order} packed "
                f"as {cls.name}: ranks would share a group of {cls.group}, whose scale is trained. Give 1, or one "
                "that leaves groups whole."
            )
        return cls

    def adopt(self, state: PackedState) -> None:
        """See `PackedWeight`; statistics may come in any float dtype, and zeros as `points`."""
        state, trained = dict(state), type(self).trained
        if "points" in state and "zeros" in trained:
            state["zeros"] = state.pop("points").float() * state["scales"].float()
        self.step_size = float(state["scales"].float().abs().mean())
        super().adopt({name: part.float() if name in trained else part for name, part in state.items()})
        for name in trained:
            getattr(self, name).requires_grad_(True)

    @torch.no_grad()
    def gradients(self, x: Tensor, dy: Tensor) -> list[Tensor]:
        """Of scales, the sums over groups of dW * codes; of zeros, those of -dW. dW is made some rows at a time."""
        rows, columns = self.shape
        x = self.packed_input(x)
        of_scales, of_zeros = torch.empty_like(self.scales), torch.empty_like(self.scales)
        step = max(PIECE // max(columns, 1), 1)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            dw = (dy[:, part].t() @ x).float()
            high = self.high[part] if self.bits == 3 else None
            of_zeros[part] = group_sums(dw, self.group).neg_()
            of_scales[part] = group_sums(dw.mul_(whole_numbers(self.codes[part], high, self.bits, columns)), self.group)
        return [of_scales, of_zeros]

    def gradients_bytes(self, dtype: torch.dtype) -> int:
        """A piece of dW, in `dtype` and fp32, and its codes."""
        return min(self.shape.numel(), PIECE) * (dtype.itemsize + 4 + 1)


class TrainedScales(TrainedStatistics):
    """Codes and whole zero points as they are, and `scales` [N, G] in fp32, trained: zeros are points times scales."""

    @torch.no_grad()
    def gradients(self, x: Tensor, dy: Tensor) -> list[Tensor]:
        """Of scales, which move the zeros, too."""
        of_scales, of_zeros = super().gradients(x, dy)
        return [of_scales.addcmul_(of_zeros, self.points.float())]


@lru_cache
def with_trained_statistics(kind: type[GroupWeight]) -> type[TrainedStatistics]:
    """The storage `kind` with its scales and zeros in fp32, marked trained; `points` become zeros."""
    if kind.has("points"):
        also = tuple(part for part in kind.OPTIONAL if kind.has(part) and part != "points")
        kind = group_storage(kind.bits, kind.group, also)
    return _trained(kind, TrainedStatistics, STATISTICS)


@lru_cache
def with_trained_scales(kind: type[GroupWeight]) -> type[TrainedScales]:
    """The storage `kind`, which has `points`, with its scales in fp32, marked trained."""
    return _trained(kind, TrainedScales, ("scales",))


def _trained(kind: type[GroupWeight], base: type[TrainedStatistics], names: tuple[str, ...]) -> type[TrainedStatistics]:
    parts = dict(kind.PARTS)
    parts |= {name: parts[name]._replace(dtype=torch.float32, trained=True) for name in names}
    about = f"{kind.name} whose {' and '.join(names)} are trained."
    made = type(f"{kind.__name__}Trained", (base, kind), {"PARTS": parts, "__doc__": about})
    made.filed = kind
    return made


def group_sums(values: Tensor, group: int) -> Tensor:
    """[N, K] -> [N, G], summed over the columns of each group; the last group may have fewer."""
    missing = -values.shape[1] % group
    return torch.nn.functional.pad(values, (0, missing)).unflatten(1, (-1, group)).sum(2)
