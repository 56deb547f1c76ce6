"""What a writer of Hugging Face directories has to know of a layout of packed matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.lazy import PackedTensor
from accessory.checkpoint.naming import Tensors
from accessory.errors import CheckpointError
from accessory.kernels.codes import GroupCodes, whole_numbers
from accessory.quant.groups import GroupWeight


@dataclass(frozen=True)
class PackedLayout:
    """How a directory holds packed matrices.

    tensors: (the matrix's name, the matrix) -> the tensors of its file by name. config: what config.json says of them.
    files: other JSON files by name. said: called when all are written, to tell what could not be kept.
    """

    tensors: Callable[[str, PackedTensor], dict[str, Tensor]]
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    said: Callable[[], None] = lambda: None


def in_groups(theirs: Tensors, target: Path, layout: str) -> dict[str, PackedTensor]:
    """The packed matrices by name. Raises `CheckpointError` where there are none, or some are not in groups."""
    packed = {name: tensor for name, tensor in theirs.items() if isinstance(tensor, PackedTensor)}
    others = [name for name, tensor in packed.items() if not issubclass(tensor.storage, GroupWeight)]
    if others or not packed:
        found = f"{others[0]} is packed as {packed[others[0]].storage.name}" if others else "nothing is packed"
        raise CheckpointError(
            f"{target}: --to {layout} holds whole numbers in groups; {found}. Give a base packed as int2_g64, "
            "int4_g128 or the like (tools/quantize.py), or write --to hf."
        )
    return packed


def codes_of(tensor: PackedTensor) -> GroupCodes:
    """The matrix, read whole; statistics that were trained in fp32 are rounded to fp16, which these files have."""
    codes = tensor.read_matrix().as_codes()
    zeros = None if codes.zeros is None else codes.zeros.half()
    return codes._replace(scales=codes.scales.half(), zeros=zeros)


def numbers_by_column(codes: GroupCodes) -> Tensor:
    """The whole numbers as they are packed: uint8 [N, K]."""
    return whole_numbers(codes.codes, codes.high, codes.bits, codes.shape[1])


def group_of_columns(codes: GroupCodes) -> Tensor:
    """The group of each packed column: int64 [K]."""
    return torch.arange(codes.shape[1]) // codes.group if codes.groups is None else codes.groups.long()
