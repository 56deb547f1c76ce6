"""How GreenBit's files hold packed matrices: numbers in words, a scale and a zero for each group, w = q scale - zero.

Layer-mix: every linear has numbers of one width. `qweight` int32 [K bits / 32, N] is words, `scales` and `zeros` are
fp16 [G, N], `q_perm` int16 [K] says which channel each column is (all zeros: its own), and the input is multiplied by
`channel_scale` fp16 [1, 1, K]; quant_strategy.json tells bits and groups. Channel-mix: the groups of a linear differ in
width; `q_groups` int16 [2 G] has the bits and the first row of words of each. Earlier files have statistics in 4 bits.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.formats.int_words import numbers_of
from accessory.checkpoint.formats.packed_groups import (
    HALVES,
    INTEGERS,
    Files,
    Parts,
    by_rows,
    channels_by_group,
    checked_bits,
    codes_of_numbers,
    codes_of_words,
    column_order,
    computed,
)
from accessory.checkpoint.lazy import HeldTensor, LazyTensor, PackedTensor, finite
from accessory.checkpoint.source import STRATEGY_FILE
from accessory.checkpoint.strategy import strategy_of
from accessory.errors import CheckpointError
from accessory.quant.groups import group_storage

_SHORTS, _BYTES = ("I16", "int16"), ("U8", "uint8")


def is_greenbit(tensors: dict[str, LazyTensor]) -> bool:
    """Whether packed matrices among `tensors` are in one of GreenBit's layouts."""
    linears = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    return any(f"{linear}.{part}" in tensors for linear in linears[:1] for part in ("zeros", "q_perm", "qstatistic"))


def packed_by_greenbit(tensors: dict[str, LazyTensor], path: Path) -> dict[str, LazyTensor]:
    """Put each packed matrix and its statistics together, unchanged; of 4-bit statistics, what GreenBit computes.

    Raises `CheckpointError` for a matrix whose parts are missing or strange.
    """
    files, strategy = Files(tensors, path), strategy_of(path) or {}
    for linear in files.packed():
        if files.holds(linear, "q_groups"):
            matrix = _channel_mix(files, linear)
        elif files.holds(linear, "qstatistic"):
            matrix = _two_levels(files, linear)
        else:
            matrix = _layer_mix(files, linear, strategy)
        files.tensors[f"{linear}.weight"] = matrix
        files.tensors.pop(f"{linear}.wf", None)  # GreenBit's table of shifts
    return files.tensors


def _layer_mix(files: Files, linear: str, strategy: dict[str, Any]) -> PackedTensor:
    words = files.take(linear, "qweight", INTEGERS, 2)
    scales, zeros = (files.take(linear, part, HALVES, 2) for part in ("scales", "zeros"))
    parts, columns = _channels(files, linear)
    bits = checked_bits(files, linear, words.shape[0] * 32 / columns)
    group = _group(files, linear, bits, columns, scales.shape[0], strategy)
    parts |= codes_of_words(words, bits) | _statistics(files, linear, words, scales, zeros)
    kind = group_storage(bits, group)
    return PackedTensor.of(parts, kind, (words.shape[1], columns), f"{files.path}: {linear}.weight")


def _group(files: Files, linear: str, bits: int, columns: int, groups: int, strategy: dict[str, Any]) -> int:
    """Channels of a group: what the strategy says, checked against the statistics; without one, their even share."""
    block, _, name = linear.rpartition(".")
    block = block.rpartition(".")[0]
    stated = strategy.get(block, {}).get(name)
    if stated is None:
        if groups == 0 or columns % groups:
            raise files.error(
                linear, "scales", f"has {groups} groups of {columns} channels", f"their size in {STRATEGY_FILE}"
            )
        return columns // groups
    try:
        group, said = int(stated["group_size"][str(bits)]), int(stated["bits"][0])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{files.path / STRATEGY_FILE}: says {stated!r} of {block}.{name}; expected bits and group_size for "
            f"{bits} bits, which {linear}.qweight has."
        ) from error
    if said != bits or group < 1 or -(-columns // group) != groups:
        raise CheckpointError(
            f"{files.path / STRATEGY_FILE}: says {said} bits in groups of {group} of {block}.{name}; its tensors have "
            f"{bits} bits in {groups} groups of {columns} channels."
        )
    return group


def _two_levels(files: Files, linear: str) -> PackedTensor:
    words = files.take(linear, "qweight", INTEGERS, 2)
    statistic = files.take(linear, "qstatistic", _BYTES, 3)
    level = {f"{of}_{part}": files.take(linear, f"{of}_{part}", HALVES, 3)
             for of in ("qscales", "qzeros") for part in ("zeros", "scales")}  # fmt: skip
    shares = statistic.shape[1]
    for part, tensor in level.items():
        if tuple(tensor.shape) not in {(statistic.shape[0], shares, 1), (1, shares, 1)}:
            expected = f"[{statistic.shape[0]}, {shares}, 1], as qstatistic has groups and shares"
            raise files.error(linear, part, f"has shape {list(tensor.shape)}", expected)
    index = files.take(linear, "g_idx", INTEGERS, 1).read().long()
    if len(index) == 0 or index.min() < 0 or index.max() >= statistic.shape[0]:
        raise files.error(linear, "g_idx", f"names other groups than {statistic.shape[0]}", "those of qstatistic")
    order, group = channels_by_group(files, linear, index)
    bits = checked_bits(files, linear, words.shape[0] * 32 / len(index))

    def expanded(of: str, shift: int) -> LazyTensor:
        """Statistics fp16 [N, G]; shift: where their codes lie in a byte."""

        def read() -> Tensor:
            """In fp16, as GreenBit's loader computes it."""
            codes = (statistic.read() >> shift & 15).half()
            names = (f"{of}_{part}" for part in ("zeros", "scales"))
            offset, scale = (finite(level[name].read(), f"{files.path}: {linear}.{name}") for name in names)
            return ((codes - offset) * scale).reshape(len(codes), -1).t().contiguous()

        return computed((math.prod(statistic.shape[1:]), statistic.shape[0]), "float16", read)

    parts = codes_of_words(words, bits, order) | {"scales": expanded("qscales", 4), "zeros": expanded("qzeros", 0)}
    parts |= {} if order is None else column_order(order)
    shape = words.shape[1], len(index)
    return PackedTensor.of(parts, group_storage(bits, group), shape, f"{files.path}: {linear}.weight")


def _channel_mix(files: Files, linear: str) -> PackedTensor:
    """All numbers are kept in the width of the widest, in groups as large as divide all of the file's."""
    words = files.take(linear, "qweight", INTEGERS, 2)
    scales, zeros = (files.take(linear, part, HALVES, 2) for part in ("scales", "zeros"))
    said = files.take(linear, "q_groups", _SHORTS, 1)
    if not said.shape[0] == 2 * scales.shape[0] > 0:
        expected = f"bits and first row of each of {scales.shape[0]} groups, as scales have"
        raise files.error(linear, "q_groups", f"has {said.shape[0]} numbers", expected)
    widths, tops = said.read().long().view(-1, 2).t().tolist()
    parts, columns = _channels(files, linear)
    for bits in widths:
        checked_bits(files, linear, bits)
    ends = [*tops[1:], words.shape[0]]
    sizes = [(end - top) * 32 // bits for bits, top, end in zip(widths, tops, ends, strict=True)]
    if sum(sizes) != columns or min(sizes) < 1:
        found = f"has {len(widths)} groups of {sum(sizes)} channels"
        raise files.error(linear, "q_groups", found, f"{scales.shape[0]} of {columns}, as scales and q_perm have")
    bits, group = max(widths), math.gcd(*sizes)

    def numbers() -> Tensor:
        """uint8 [N, K]."""
        stored, runs = words.read(), list(zip(widths, tops, ends, strict=True))
        return torch.cat([numbers_of(stored[top:end], width) for width, top, end in runs], 1)

    repeats = torch.tensor(sizes) // group
    parts |= codes_of_numbers(numbers, (words.shape[1], columns), bits)
    for name, tensor in _statistics(files, linear, words, scales, zeros).items():
        shape = words.shape[1], columns // group
        parts[name] = computed(shape, "float16", lambda tensor=tensor: tensor.read().repeat_interleave(repeats, 1))
    return PackedTensor.of(
        parts, group_storage(bits, group), (words.shape[1], columns), f"{files.path}: {linear}.weight"
    )


def _statistics(files: Files, linear: str, words: LazyTensor, scales: LazyTensor, zeros: LazyTensor) -> Parts:
    if scales.shape[1] != words.shape[1] or zeros.shape != scales.shape:
        found = f"and scales have shapes {list(zeros.shape)} and {list(scales.shape)}"
        raise files.error(linear, "zeros", found, f"one shape [groups, {words.shape[1]}]")
    named = {"scales": scales, "zeros": zeros}
    return {name: by_rows(tensor, f"{files.path}: {linear}.{name}") for name, tensor in named.items()}


def _channels(files: Files, linear: str) -> tuple[Parts, int]:
    """(`order` and `channel_scale` where they change anything, number of channels)."""
    order = files.take(linear, "q_perm", _SHORTS, 1).read().long() & 0xFFFF  # written as unsigned numbers
    scale = files.take(linear, "channel_scale", HALVES, 3).read().flatten()
    finite(scale, f"{files.path}: {linear}.channel_scale")
    columns = len(order)
    if scale.shape != (columns,):
        raise files.error(linear, "channel_scale", f"has {len(scale)} numbers", f"{columns}, as q_perm has")
    parts: Parts = {}
    if order.any():
        if not torch.equal(order.sort().values, torch.arange(columns)):
            raise files.error(linear, "q_perm", "names a channel twice", f"each of {columns} once, or zeros")
        parts |= column_order(order)
    if not (scale == 1).all():
        if not torch.equal(scale.half().to(scale.dtype), scale):
            raise files.error(linear, "channel_scale", "has numbers that fp16 does not have", "fp16")
        parts["channel_scale"] = HeldTensor(scale.half())
    return parts, columns
