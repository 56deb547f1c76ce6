"""GGUF's types that hold whole numbers in groups: Q4_0 and Q4_1, in blocks of 32 columns.

w = d (q - 8) and w = d q + m, with q of 4 bits; d and m are fp16. A zero point times its scale is rounded to be an m.
Q2_K and Q3_K are left out: the scales of their blocks are multiples of one fp16 number, which fp16 scales of groups are
not.
"""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from accessory.checkpoint.formats.packed_layout import codes_of, numbers_by_column
from accessory.checkpoint.lazy import LazyTensor, PackedTensor
from accessory.kernels.codes import GroupCodes
from accessory.quant.groups import GroupWeight

BLOCK = 32


def kind_of(tensor: LazyTensor) -> Kind | None:
    """The type that holds a matrix; None where there is none, or it is not packed in groups."""
    if not (isinstance(tensor, PackedTensor) and issubclass(tensor.storage, GroupWeight)):
        return None
    columns, group, parts = tensor.shape[1], tensor.storage.group, tensor.storage.PARTS
    whole = columns % BLOCK == 0 and (group % BLOCK == 0 or group >= columns)
    if not whole or not parts.keys().isdisjoint(("order", "channel_scale", "groups")):
        return None
    if "points" not in parts:
        return Kind.Q4_1
    numbers = _less_points(codes_of(tensor)) + 8
    return Kind.Q4_0 if numbers.min() >= 0 and numbers.max() <= 15 else Kind.Q4_1


def is_rounded(tensor: PackedTensor, kind: Kind) -> bool:
    """Whether zeros are rounded in a `kind` that `kind_of` gave: to fp16, by up to 2^-11 of themselves."""
    return kind == Kind.Q4_1 and tensor.storage.has("points")


def encoded(tensor: PackedTensor, kind: Kind) -> np.ndarray:
    """The matrix as the bytes of `kind`, which `kind_of` gave."""
    codes = codes_of(tensor)
    blocks = [_of_blocks(codes, codes.scales)]
    if kind == Kind.Q4_1:
        zeros = codes.zeros if codes.points is None else codes.points * codes.scales
        blocks += [_of_blocks(codes, -zeros), _nibbles(numbers_by_column(codes))]
    else:
        blocks.append(_nibbles((_less_points(codes) + 8).to(torch.uint8)))
    return torch.cat(blocks, -1).flatten(1).numpy()


def _less_points(codes: GroupCodes) -> Tensor:
    """The numbers less their zero points: int8 [N, K]."""
    columns = torch.arange(codes.shape[1]) // codes.group
    return numbers_by_column(codes).to(torch.int8) - codes.points.to(torch.int8)[:, columns]


def _of_blocks(codes: GroupCodes, statistic: Tensor) -> Tensor:
    """A statistic fp16 [N, G] as bytes of each block: uint8 [N, K / 32, 2]."""
    groups = torch.arange(0, codes.shape[1], BLOCK) // codes.group
    return statistic[:, groups, None].contiguous().view(torch.uint8)


def _nibbles(numbers: Tensor) -> Tensor:
    """Numbers of 4 bits uint8 [N, K] -> [N, K / 32, 16]: the first half of a block lies in the low bits."""
    low, high = numbers.unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
    return low | high << 4
