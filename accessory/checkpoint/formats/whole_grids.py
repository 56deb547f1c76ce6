"""Grids with whole zero points, which GPTQ's and AWQ's files hold; matrices with zeros of any value are fitted to one.

Such a matrix is written in 4 bits, however few it had: at its own bits, whole points would change it as much as
rounding it did in the first place.
"""

from __future__ import annotations

from math import gcd
from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.formats.packed_layout import codes_of, group_of_columns, numbers_by_column
from accessory.checkpoint.lazy import PackedTensor
from accessory.checkpoint.merge import RepackedTensor
from accessory.errors import CheckpointError
from accessory.kernels.codes import GroupCodes
from accessory.quant.groups import packed_codes
from accessory.quant.whole_points import widened

WIDEST = 4
"""Bits of the numbers of a matrix that is fitted again."""


class WholeGrids:
    """Packed matrices with whole zero points; counts those that were fitted to such a grid, and how far they are off.

    layout: the file format, for errors.
    """

    def __init__(self, target: Path, layout: str) -> None:
        self.target, self.layout = target, layout
        self._seen: dict[str, tuple[float, float]] = {}  # name -> squares of what changed, and of all weights

    def refuse(self, name: str, tensor: PackedTensor) -> None:
        """Raise `CheckpointError` for a matrix that the format has no place for, whatever its zeros are."""
        has = tensor.storage.has
        if has("channel_scale"):
            raise CheckpointError(
                f"{self.target}: {name} has a scale for each input channel, which {self.layout}'s files have no place "
                "for; write it --to greenbit."
            )
        if has("groups") and not has("points"):
            raise CheckpointError(
                f"{self.target}: {name} has groups of unequal sizes and zeros of any value, which {self.layout}'s "
                "files have no place for; write it --to accessory."
            )

    def bits_and_symmetry(self, tensor: PackedTensor) -> tuple[int, bool]:
        """(bits of the numbers that are written, whether every zero point is in the middle of their range)."""
        if isinstance(tensor, RepackedTensor):  # whose points are fitted when it is read, to no such rule
            return (tensor.storage.bits if tensor.storage.has("points") else WIDEST), False
        points = _whole_points(codes_of(tensor))
        if points is None:
            return WIDEST, False
        return tensor.storage.bits, bool((points == 1 << tensor.storage.bits - 1).all())

    def of(self, name: str, tensor: PackedTensor) -> GroupCodes:
        """The matrix with whole points."""
        codes = codes_of(tensor)
        points = _whole_points(codes)
        if points is not None:
            return codes._replace(zeros=None, points=points)
        index, numbers = group_of_columns(codes), numbers_by_column(codes)
        weight = numbers * codes.scales.float()[:, index] - codes.zeros.float()[:, index]
        grid = codes.scales, codes.zeros, codes.group
        found, scales, points = widened(weight, *grid, bits=codes.bits, wide=WIDEST)
        change = (found - points.float()[:, index]) * scales.float()[:, index] - weight
        self._seen[name] = float(change.square().sum()), float(weight.square().sum())
        made = codes._replace(bits=WIDEST, high=None, scales=scales, zeros=None, points=points)
        return made._replace(codes=packed_codes(found, WIDEST)["codes"])

    def say(self) -> None:
        """Print how many matrices were fitted again, and how far they are off; nothing if none was."""
        if not self._seen:
            return
        changed, squares = (sum(each) for each in zip(*self._seen.values(), strict=True))
        shares = {name: _ratio(*both) for name, both in self._seen.items()}
        worst = max(shares, key=shares.get)
        print(
            f"{self.target}: zeros of {len(shares)} matrices are no whole multiples of their scales, which "
            f"{self.layout}'s files hold. They are written in {WIDEST} bits, and their weights change by "
            f"{_ratio(changed, squares):.1%} (root mean square), by {shares[worst]:.1%} in {worst}."
        )


def regrouped(codes: GroupCodes, group: int) -> GroupCodes:
    """The same matrix, with statistics for each `group` columns, which divides its groups and the last one."""
    index = torch.arange(0, codes.shape[1], group) // codes.group
    return codes._replace(group=group, scales=codes.scales[:, index], points=codes.points[:, index])


def even_group(tensor: PackedTensor) -> int:
    """The most columns of equal groups, none of which goes beyond one of the matrix's."""
    return gcd(tensor.storage.group, tensor.shape[1])


def _whole_points(codes: GroupCodes) -> Tensor | None:
    if codes.points is not None:
        return codes.points
    scales, zeros = codes.scales.float(), codes.zeros.float()
    points = (zeros / scales).nan_to_num(0).round().clamp(0, (1 << codes.bits) - 1)
    exact = torch.equal((points * scales).to(codes.zeros.dtype), codes.zeros)
    return points.to(torch.uint8) if exact else None


def _ratio(changed: float, squares: float) -> float:
    return (changed / squares) ** 0.5 if squares else 0.0
