"""Writes packed matrices as GPTQ's files hold them (see `gptq`), which transformers and gptqmodel load."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.formats.int_words import words_of
from accessory.checkpoint.formats.packed_layout import PackedLayout, group_of_columns, in_groups, numbers_by_column
from accessory.checkpoint.formats.whole_grids import WholeGrids, even_group, regrouped
from accessory.checkpoint.lazy import PackedTensor
from accessory.checkpoint.naming import Tensors
from accessory.errors import CheckpointError

SIZES = (16, 32, 64, 128, 256, 512, 1024)
"""Of groups, as gptqmodel takes them."""


def gptq_layout(theirs: Tensors, linears: set[str], target: Path, dtype: torch.dtype) -> PackedLayout:
    """How to write the packed matrices among `theirs`; linears: names of all matrices of blocks, packed or not.

    The format is "gptq" where all grids are symmetric, which every program reads; else "gptq_v2": gptqmodel refuses
    other zero points in the older format, if others wrote them. Raises `CheckpointError` for a matrix that the format
    cannot hold.
    """
    packed, grids = in_groups(theirs, target, "gptq"), WholeGrids(target, "GPTQ")
    symmetric, ordered, widths = True, False, {}
    for name, tensor in packed.items():
        grids.refuse(name, tensor)
        bits, even = grids.bits_and_symmetry(tensor)
        symmetric &= even
        ordered |= tensor.storage.has("order") or tensor.storage.has("groups")
        widths[name] = bits
        _check_words(tensor.shape, bits, f"{target}: {name}")
    groups = _groups(packed, one_width=len(set(widths.values())) == 1)
    kinds = {name: (bits, groups[name]) for name, bits in widths.items()}
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
    return PackedLayout(partial(_tensors, grids, groups, symmetric), {"quantization_config": config}, said=grids.say)


def _groups(packed: dict[str, PackedTensor], *, one_width: bool) -> dict[str, int]:
    """Columns of each matrix's groups in the file; -1 where a row is one, as GPTQ's word is.

    transformers knows one size for all matrices, and most kernels want a row's groups to be of equal sizes. Where
    smaller groups make it so, each has the statistics of the group that it lies in.
    """
    found = {name: _group(tensor) for name, tensor in packed.items()}
    equal = gcd(*(even_group(tensor) for tensor in packed.values()))
    if one_width and len(set(found.values())) > 1 and equal in SIZES and not any(map(_indexed, packed.values())):
        return dict.fromkeys(found, equal)
    return found


def _group(tensor: PackedTensor) -> int:
    group, equal = tensor.storage.group, even_group(tensor)
    if group >= tensor.shape[1]:
        return -1
    return equal if equal in SIZES and not _indexed(tensor) else group


def _indexed(tensor: PackedTensor) -> bool:
    return tensor.storage.has("groups")


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


def _tensors(
    grids: WholeGrids, groups: dict[str, int], less_one: bool, name: str, tensor: PackedTensor
) -> dict[str, Tensor]:
    codes, linear, group = grids.of(name, tensor), name.removesuffix(".weight"), groups[name]
    if 0 < group < min(codes.group, codes.shape[1]):
        codes = regrouped(codes, group)
    index, numbers = group_of_columns(codes), numbers_by_column(codes)
    if codes.order is not None:
        order = codes.order.long()
        numbers = torch.empty_like(numbers).index_copy_(1, order, numbers)
        index = torch.empty_like(index).index_copy_(0, order, index)
    parts = {
        "qweight": words_of(numbers, codes.bits),
        "qzeros": words_of(codes.points.t() - int(less_one), codes.bits).t().contiguous(),
        "scales": codes.scales.t().contiguous(),
        "g_idx": index.int(),
    }
    return {f"{linear}.{part}": value for part, value in parts.items()}


def _check_words(shape: tuple[int, int], bits: int, where: str) -> None:
    """Raise `CheckpointError` for a matrix whose rows or columns do not fill words."""
    if any(size * bits % 32 for size in shape):
        multiple = 32 if bits == 3 else 32 // bits
        raise CheckpointError(f"{where} has shape {list(shape)}; GPTQ's words expect multiples of {multiple}.")
