"""Matrices of 2, 3 and 4-bit codes in groups, unpacked."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.kernels.codes import GroupCodes, whole_numbers

PIECES = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Weights that are unpacked at a time."""


def dequantize(w: GroupCodes, out: Tensor) -> Tensor:
    """Fill `out` [n, k] with W in its dtype, its columns by channel; returns it.

    Each weight is computed in fp32, where only the last subtraction is rounded, and rounded to out's dtype.
    """
    n, step = w.shape[0], _rows_at_a_time(w.shape, out.device)
    order = None if w.order is None else w.order.long()
    for top in range(0, n, step):
        part = slice(top, top + step)
        out[part] = _by_channel(_weights(w, part), w, order)  # without a name, it is gone before the next is made
    return out


def workspace_bytes(shape: tuple[int, int], device: torch.device, *, ordered: bool) -> int:
    """Bytes that `dequantize` works in: of fp32 and codes, or, of a matrix with an `order`, of fp32 twice."""
    weights = min(shape[0], _rows_at_a_time(shape, device)) * shape[1]
    return (8 if ordered else 5) * weights


def _rows_at_a_time(shape: tuple[int, int], device: torch.device) -> int:
    return max(PIECES[device.type] // max(shape[1], 1), 1)


def _weights(w: GroupCodes, part: slice) -> Tensor:
    """The rows `part` of W in fp32, their columns as they are packed."""
    wide = whole_numbers(w.codes[part], None if w.high is None else w.high[part], w.bits, w.shape[1]).float()
    scales = w.scales[part].float()
    if w.groups is not None:
        groups = w.groups.long()
        if w.points is None:
            return wide.mul_(scales[:, groups]).sub_(w.zeros[part].float()[:, groups])
        return wide.sub_(w.points[part].float()[:, groups]).mul_(scales[:, groups])
    whole = w.shape[1] // w.group
    for columns, groups in _runs(wide, whole, w.group):
        if w.points is None:
            columns.mul_(scales[:, groups, None]).sub_(w.zeros[part, groups, None].float())
        else:
            columns.sub_(w.points[part, groups, None].float()).mul_(scales[:, groups, None])
    return wide


def _by_channel(wide: Tensor, w: GroupCodes, order: Tensor | None) -> Tensor:
    """Rows of packed columns, fp32, as `w` has them for the channels of x; `wide` may be overwritten."""
    if order is not None:
        wide = torch.empty_like(wide).index_copy_(1, order, wide)
    return wide if w.channel_scale is None else wide.mul_(w.channel_scale.float())


def _runs(wide: Tensor, whole: int, group: int) -> list[tuple[Tensor, slice]]:
    """(columns [n, groups, width], which groups these are): the whole ones, and the last if it is shorter."""
    inside = whole * group
    runs = [(wide[:, :inside].unflatten(1, (whole, group)), slice(0, whole))] if whole else []
    if wide.shape[1] > inside:
        runs.append((wide[:, None, inside:], slice(whole, whole + 1)))
    return runs
