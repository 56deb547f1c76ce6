"""Writes packed matrices as AWQ's files hold them (see `awq`), which transformers and gptqmodel load."""

from __future__ import annotations

from functools import partial
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.formats.awq import BITS, PLACES
from accessory.checkpoint.formats.packed_layout import PackedLayout, in_groups, numbers_by_column
from accessory.checkpoint.formats.whole_grids import WholeGrids, even_group, regrouped
from accessory.checkpoint.lazy import PackedTensor
from accessory.checkpoint.naming import Tensors
from accessory.errors import CheckpointError

WIDEST_GROUP = 128
"""As kernels for AWQ take them."""


def awq_layout(theirs: Tensors, linears: set[str], target: Path, dtype: torch.dtype) -> PackedLayout:
    """How to write the packed matrices among `theirs`; linears: names of all matrices of blocks, packed or not.

    All have 4 bits there, and groups of one size: the largest that divides those of every matrix. Raises
    `CheckpointError` for a matrix that the format cannot hold.
    """
    packed, grids = in_groups(theirs, target, "awq"), WholeGrids(target, "AWQ")
    for name, tensor in packed.items():
        grids.refuse(name, tensor)
        if tensor.storage.has("order") or tensor.storage.has("groups"):
            raise CheckpointError(
                f"{target}: {name} has its channels in another order (act-order), which AWQ's files have no place for; "
                "write it --to gptq."
            )
        if tensor.shape[0] % len(PLACES):
            raise CheckpointError(f"{target}: {name} has shape {list(tensor.shape)}; AWQ's words hold 8 rows each.")
    group = gcd(WIDEST_GROUP, *(even_group(tensor) for tensor in packed.values()))
    config: dict[str, Any] = {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
    }
    if plain := sorted(name.removesuffix(".weight") for name in linears - packed.keys()):
        config["modules_to_not_convert"] = plain
    return PackedLayout(partial(_tensors, grids, group), {"quantization_config": config}, said=grids.say)


def _tensors(grids: WholeGrids, group: int, name: str, tensor: PackedTensor) -> dict[str, Tensor]:
    codes, linear = regrouped(grids.of(name, tensor), group), name.removesuffix(".weight")
    parts = {
        "qweight": interleaving(numbers_by_column(codes)),
        "qzeros": interleaving(codes.points),
        "scales": codes.scales.t().contiguous(),
    }
    return {f"{linear}.{part}": value for part, value in parts.items()}


def interleaving(numbers: Tensor) -> Tensor:
    """The inverse of `awq.interleaved`: uint8 [N, X] -> words int32 [X, N / 8]."""
    places = torch.tensor(PLACES).argsort()
    nibbles = numbers.t().unflatten(1, (-1, len(PLACES)))[:, :, places]
    octets = nibbles[:, :, 0::2] | nibbles[:, :, 1::2] << 4
    return octets.contiguous().flatten(1).view(torch.int32)
