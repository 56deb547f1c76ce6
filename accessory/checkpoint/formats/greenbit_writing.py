"""Writes packed matrices as GreenBit's layer-mix files hold them (see `greenbit`), with quant_strategy.json."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.formats.int_words import words_of
from accessory.checkpoint.formats.packed_layout import PackedLayout, codes_of, in_groups, numbers_by_column
from accessory.checkpoint.lazy import PackedTensor
from accessory.checkpoint.naming import Tensors
from accessory.checkpoint.source import STRATEGY_FILE
from accessory.checkpoint.strategy import MEASUREMENT
from accessory.errors import CheckpointError
from accessory.kernels.codes import GroupCodes

WIDTHS = (2, 4)
"""Bits of a number in layer-mix."""


def greenbit_layout(theirs: Tensors, linears: set[str], target: Path, dtype: torch.dtype) -> PackedLayout:
    """How to write the packed matrices among `theirs`; linears: names of all matrices of blocks, packed or not.

    Raises `CheckpointError` for what the format cannot hold.
    """
    packed = in_groups(theirs, target, "greenbit")
    if plain := sorted(linears - packed.keys()):
        raise CheckpointError(f"{target}: {plain[0]} is not packed; GreenBit's files pack every linear of the blocks.")
    strategy: dict[str, dict[str, Any]] = {}
    for name, tensor in packed.items():
        bits, group = tensor.storage.bits, min(tensor.storage.group, tensor.shape[1])
        if bits not in WIDTHS:
            raise CheckpointError(f"{target}: {name} has numbers of {bits} bits; GreenBit's files hold 2 and 4.")
        block, _, leaf = name.removesuffix(".weight").rpartition(".")
        said = {"group_size": {str(bits): group}, "bits": [bits], "bits_prop": [1.0], "scale_bits": 4}
        strategy.setdefault(block.rpartition(".")[0], {})[leaf] = said
    return PackedLayout(partial(_tensors, target), files={STRATEGY_FILE: {MEASUREMENT: strategy}})


def _tensors(target: Path, name: str, tensor: PackedTensor) -> dict[str, Tensor]:
    codes, linear = codes_of(tensor), name.removesuffix(".weight")
    if codes.groups is not None or codes.shape[1] * codes.bits % 32:
        found = "groups of unequal sizes" if codes.groups is not None else f"{codes.shape[1]} columns"
        raise CheckpointError(f"{target}: {name} has {found}, which GreenBit's files have no place for.")
    order = torch.zeros(codes.shape[1], dtype=torch.int32) if codes.order is None else codes.order
    scale = torch.ones(codes.shape[1], dtype=torch.float16) if codes.channel_scale is None else codes.channel_scale
    parts = {
        "qweight": words_of(numbers_by_column(codes), codes.bits),
        "scales": codes.scales.t().contiguous(),
        "zeros": _zeros(codes, f"{target}: {name}").t().contiguous(),
        "q_perm": order.to(torch.int16),
        "channel_scale": scale[None, None],
    }
    return {f"{linear}.{part}": value for part, value in parts.items()}


def _zeros(codes: GroupCodes, name: str) -> Tensor:
    """Zeros fp16 [N, G]; where whole zero points times scales have to be rounded to that, a line says so."""
    if codes.points is None:
        return codes.zeros
    exact = codes.points.float() * codes.scales.float()
    zeros = exact.half()
    if inexact := int((zeros.float() != exact).sum()):
        share = (zeros.float() - exact).abs().max() / exact.abs().max()
        print(f"{name}: {inexact} of {zeros.numel()} zeros are rounded to fp16, by at most {share:.0e} of the largest.")
    return zeros
