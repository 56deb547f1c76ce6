"""Writes packed matrices as GPTQ's files hold them (see `gptq`), which transformers and gptqmodel load."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.formats.int_words import words_of
from accessory.checkpoint.formats.packed_layout import (
    PackedLayout,
    codes_of,
    group_of_columns,
    in_groups,
    numbers_by_column,
)
from accessory.checkpoint.lazy import PackedTensor
from accessory.checkpoint.naming import Tensors
from accessory.errors import CheckpointError
from accessory.kernels.codes import GroupCodes


def gptq_layout(theirs: Tensors, linears: set[str], target: Path, dtype: torch.dtype) -> PackedLayout:
    """How to write the packed matrices among `theirs`; linears: names of all matrices of blocks, packed or not.

    The format is "gptq" where all grids are symmetric, which every program reads; else "gptq_v2": gptqmodel refuses
    other zero points in the older format, if others wrote them. Raises `CheckpointError` for a matrix that the format
    cannot hold.
    """
    packed = in_groups(theirs, target, "gptq")
    symmetric, ordered = True, False
    for name, tensor in packed.items():
        codes = codes_of(tensor)
        points = _points(codes, f"{target}: {name}")
        symmetric &= bool((points == 1 << codes.bits - 1).all())
        ordered |= codes.order is not None or codes.groups is not None
    kinds = {name: (tensor.storage.bits, _group(tensor)) for name, tensor in packed.items()}
    (bits, group), _ = Counter(kinds.values()).most_common(1)[0]
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": ordered,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
    }
    if dynamic := _exceptions(kinds, (bits, group), linears):
        config["dynamic"] = dynamic
    return PackedLayout(partial(_tensors, target, symmetric), {"quantization_config": config})


def _group(tensor: PackedTensor) -> int:
    """GPTQ's word for the size of groups: -1 where a row is one."""
    return -1 if tensor.storage.group >= tensor.shape[1] else tensor.storage.group


def _exceptions(
    kinds: dict[str, tuple[int, int]], common: tuple[int, int], linears: set[str]
) -> dict[str, dict[str, int]]:
    """gptqmodel's words for linears that are packed otherwise than most ("+:"), or not at all ("-:")."""
    found = {}
    for name in sorted(linears):
        pattern = re.escape(name.removesuffix(".weight")).replace(r"\_", "_")
        if name not in kinds:
            found[f"-:{pattern}"] = {}
        elif kinds[name] != common:
            found[f"+:{pattern}"] = {"bits": kinds[name][0], "group_size": kinds[name][1]}
    return found


def _tensors(target: Path, less_one: bool, name: str, tensor: PackedTensor) -> dict[str, Tensor]:
    codes, linear = codes_of(tensor), name.removesuffix(".weight")
    points, index = _points(codes, f"{target}: {name}"), group_of_columns(codes)
    numbers = numbers_by_column(codes)
    if codes.order is not None:
        order = codes.order.long()
        numbers = torch.empty_like(numbers).index_copy_(1, order, numbers)
        index = torch.empty_like(index).index_copy_(0, order, index)
    zeros = words_of(points.t() - int(less_one), codes.bits).t().contiguous()
    parts = {
        "qweight": words_of(numbers, codes.bits),
        "qzeros": zeros,
        "scales": codes.scales.t().contiguous(),
        "g_idx": index.int(),
    }
    return {f"{linear}.{part}": value for part, value in parts.items()}


def _points(codes: GroupCodes, where: str) -> Tensor:
    """Zero points uint8 [N, G]. Raises `CheckpointError` for zeros that are no whole multiples of their scales."""
    (n, k), bits = codes.shape, codes.bits
    if k * bits % 32 or n * bits % 32:
        multiple = 32 if bits == 3 else 32 // bits
        raise CheckpointError(f"{where} has shape [{n}, {k}]; GPTQ's words expect multiples of {multiple}.")
    if codes.channel_scale is not None:
        raise CheckpointError(
            f"{where} has a scale for each input channel, which GPTQ's files have no place for; write it --to greenbit."
        )
    if codes.points is not None:
        return codes.points
    scales, zeros = codes.scales.float(), codes.zeros.float()
    points = (zeros / scales).nan_to_num(0).round().clamp(0, (1 << bits) - 1)
    if not torch.equal((points * scales).to(codes.zeros.dtype), codes.zeros):
        raise CheckpointError(
            f"{where} has zeros that are no whole multiples of their scales; GPTQ's files hold whole zero points. "
            "Write it --to greenbit or --to accessory."
        )
    return points.to(torch.uint8)
