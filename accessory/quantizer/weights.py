"""Matrices that a block is run with while it is quantized: one that notes moments, and one that is trained."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from accessory.kernels.single_precision import by_onednn, product
from accessory.quant.packed import PackedWeight, Part
from accessory.quant.trained_groups import group_sums
from accessory.quantizer.grid import Grid, on_grid, pieces

_PANEL = 1024  # rows of X^T X that are computed at a time, beside their sum


class Moments:
    """Sums over tokens: `inputs` X^T X [K, K], and of each output's squared gradient, `gradients` [N]; fp32.

    shared: where the inputs are noted, if not here, because another matrix has the same.
    """

    def __init__(self, shared: Moments | None = None) -> None:
        self.shared = shared
        self.inputs: Tensor | None = None
        self.gradients: Tensor | None = None

    def add_inputs(self, x: Tensor) -> None:
        """x [T, K]."""
        if self.shared is not None:
            return
        turned = x.float().t().contiguous()
        if self.inputs is None:
            self.inputs = turned.new_zeros(len(turned), len(turned))
        with by_onednn():
            for part, place in zip(turned.split(_PANEL), self.inputs.split(_PANEL), strict=True):
                place.add_(product(part, turned.t()))

    def hessian(self) -> Tensor:
        """X^T X [K, K], wherever it is noted."""
        return self.inputs if self.shared is None else self.shared.hessian()

    def add_gradients(self, dy: Tensor) -> None:
        """dy [T, N]."""
        squares = dy.float().square().sum(0)
        self.gradients = squares if self.gradients is None else self.gradients.add_(squares)


class WatchedWeight(PackedWeight):
    """A plain matrix W [N, K] that adds to `moments` what is multiplied with it, and in a backward the gradients."""

    name, bits = "watched", 16
    PARTS: ClassVar = {"codes": Part(torch.bfloat16, trained=True)}

    def __init__(self, weight: Tensor, moments: Moments) -> None:
        super().__init__(tuple(weight.shape))
        self.moments = moments
        self.codes = nn.Parameter(weight.detach(), requires_grad=True)

    def pack(self, weight: Tensor) -> None:
        """See `PackedWeight`."""
        self.codes = nn.Parameter(weight, requires_grad=True)

    def unpack_into(self, out: Tensor) -> Tensor:
        """See `PackedWeight`."""
        return out.copy_(self.codes.detach())

    def add_product(self, y: Tensor | None, x: Tensor) -> Tensor:
        """See `PackedWeight`."""
        self.moments.add_inputs(x.detach())
        return super().add_product(y, x)

    def gradients(self, x: Tensor, dy: Tensor) -> list[Tensor | None]:
        """None is given to anyone: the moments are what is wanted."""
        self.moments.add_gradients(dy)
        return [None]


class LatentWeight(PackedWeight):
    """W [N, K] = round(codes) * scales - zeros, where all three are trained fp32 numbers: the grid's own tensors.

    `codes` [N, K] are kept between whole numbers. Rounding hands a gradient through as it is ("straight-through"), but
    for codes outside their range; scales and zeros get the exact one. A code's gradient is left undivided by its
    scale: Adam, which trains it, would take that out again.
    """

    name, bits = "latent", 32
    PARTS: ClassVar = {name: Part(torch.float32, trained=True) for name in ("codes", "scales", "zeros")}

    def __init__(self, grid: Grid) -> None:
        super().__init__(tuple(grid.codes.shape))
        self.width, self.group, self.top = grid.bits, grid.group, grid.top
        for name, part in self.PARTS.items():
            setattr(self, name, nn.Parameter(getattr(grid, name), requires_grad=part.trained))

    def pack(self, weight: Tensor) -> None:
        """There is no grid to begin from."""
        raise AssertionError("a latent matrix is made of a grid")

    @torch.no_grad()
    def unpack_into(self, out: Tensor) -> Tensor:
        """See `PackedWeight`."""
        for part in pieces(*self.shape):
            out[part] = on_grid(self._rounded(part), self.scales[part], self._zeros(part), self.group)
        return out

    @torch.no_grad()
    def gradients(self, x: Tensor, dy: Tensor) -> list[Tensor]:
        """Of codes, scales and zeros."""
        found = [torch.empty_like(getattr(self, name)) for name in self.PARTS]
        for part in pieces(*self.shape):
            dw = (dy[:, part].t() @ x).float()
            found[1][part] = group_sums(self._rounded(part).mul_(dw), self.group)
            found[2][part] = group_sums(dw, self.group).neg_()
            codes = self.codes[part]
            torch.mul(dw, (codes > -0.5) & (codes < self.top + 0.5), out=found[0][part])
        return found

    def as_grid(self) -> Grid:
        """What was trained, rounded."""
        points = self.points.detach() if "points" in self.PARTS else None
        parts = (part.detach() for part in (self.codes, self.scales, self._zeros(slice(None))))
        return Grid(*parts, self.width, self.group, points).rounded()

    def _rounded(self, rows: slice) -> Tensor:
        return self.codes.detach()[rows].round().clamp_(0, self.top)

    def _zeros(self, rows: slice) -> Tensor:
        return self.zeros[rows]


class WholeLatentWeight(LatentWeight):
    """W = (round(codes) - points) * scales: whole zero points stay as they are; codes and scales are trained."""

    PARTS: ClassVar = {
        "codes": Part(torch.float32, trained=True),
        "scales": Part(torch.float32, trained=True),
        "points": Part(torch.float32),
    }

    @torch.no_grad()
    def gradients(self, x: Tensor, dy: Tensor) -> list[Tensor]:
        """Of codes and scales, which move the zeros, too."""
        of_codes, of_scales, of_zeros = super().gradients(x, dy)
        return [of_codes, of_scales.addcmul_(of_zeros, self.points)]

    def _zeros(self, rows: slice) -> Tensor:
        return self.points[rows] * self.scales[rows]


def latent_weight(grid: Grid) -> LatentWeight:
    """A matrix that is trained from `grid` on, whose parts it takes."""
    return LatentWeight(grid) if grid.points is None else WholeLatentWeight(grid)
