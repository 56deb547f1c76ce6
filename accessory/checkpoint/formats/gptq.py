"""How GPTQ's files hold packed matrices: whole numbers in words, a scale and a whole zero point for each group.

`qweight` int32 [K bits / 32, N] and `qzeros` int32 [G, N bits / 32] are words, `scales` is fp16 [G, N], and `g_idx`
int32 [K] says which group each channel is of: w[n, k] = (q - point) * scale. Channels may lie in groups in any order.
Files of the format "gptq" hold each word of points less one in each of its numbers, those of "gptq_v2" the points.
Numbers of 8 bits, for which there is no storage here, are read as plain weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.formats.int_words import numbers_of
from accessory.checkpoint.formats.packed_groups import (
    HALVES,
    INTEGERS,
    Files,
    by_rows,
    channels_by_group,
    checked_bits,
    codes_of_words,
    column_order,
    computed,
)
from accessory.checkpoint.formats.stated_packing import Stated
from accessory.checkpoint.lazy import LazyTensor, PackedTensor, UnpackedTensor, cut
from accessory.errors import CheckpointError, nearest
from accessory.quant.groups import group_storage

FORMATS = ("gptq", "gptq_v2")
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""Bits of a number -> a word in which each is 1."""
UNPACKED = 8
"""Bits of numbers that are read as plain weights."""


def packed_by_gptq(tensors: dict[str, LazyTensor], stated: Stated, path: Path) -> dict[str, LazyTensor]:
    """Put each packed matrix and its statistics together, unchanged.

    Raises `CheckpointError` for another format, for a matrix whose parts are missing or strange, and where `stated`
    contradicts them.
    """
    kind = stated.config.get("checkpoint_format", stated.config.get("format", "gptq"))
    if kind not in FORMATS:
        raise CheckpointError(
            f"{stated.file}: its quantization_config says checkpoint_format {kind!r}; expected one of "
            f"{', '.join(FORMATS)}.{nearest(str(kind), FORMATS)}"
        )
    files = Files(tensors, path)
    if not files.packed():
        raise CheckpointError(f"{path}: its quantization_config says gptq; expected tensors called *.qweight.")
    for linear in files.packed():
        files.tensors[f"{linear}.weight"] = _matrix(files, linear, stated, kind == "gptq")
    return files.tensors


def _matrix(files: Files, linear: str, stated: Stated, less_one: bool) -> LazyTensor:
    words = files.take(linear, "qweight", INTEGERS, 2)
    points = files.take(linear, "qzeros", INTEGERS, 2)
    scales = files.take(linear, "scales", HALVES, 2)
    index = _group_index(files, linear, words.shape[0], scales.shape[0], stated)
    columns, (groups, rows) = len(index), scales.shape
    bits = checked_bits(files, linear, words.shape[0] * 32 / columns, UNPACKED)
    order, group = channels_by_group(files, linear, index)
    stated.check(linear, bits, group, columns, ordered=order is not None)
    if words.shape[1] != rows:
        raise files.error(linear, "qweight", f"has {words.shape[1]} columns", f"{rows}, as its scales have")
    if points.shape != (groups, rows * bits / 32):
        raise files.error(linear, "qzeros", f"has shape {list(points.shape)}", f"[{groups}, {rows * bits / 32:g}]")

    def whole_points() -> Tensor:
        """uint8 [N, G]."""
        found = zero_points(points.read(), bits, less_one)
        stated.check_points(linear, found, bits)
        return found

    by_group = by_rows(scales, f"{files.path}: {linear}.scales")
    if bits == UNPACKED:

        def weights() -> Tensor:
            """fp32 [N, K]."""
            found = numbers_of(words.read(), bits).float().sub_(whole_points().float()[:, index])
            return found.mul_(by_group.read().float()[:, index])

        return UnpackedTensor((rows, columns), "float32", lambda *span: cut(weights(), *span))
    parts = codes_of_words(words, bits, order)
    parts["scales"] = by_group
    parts["points"] = computed((rows, groups), "uint8", whole_points)
    parts |= {} if order is None else column_order(order)
    return PackedTensor.of(parts, group_storage(bits, group), (rows, columns), f"{files.path}: {linear}.weight")


def zero_points(words: Tensor, bits: int, less_one: bool) -> Tensor:
    """Words [G, N bits / 32] -> the zero points uint8 [N, G]; less_one: as the format "gptq" holds them.

    There 1 was taken from each number of a word at once, which borrows from the next number where a point was 0. Of 3
    bits, where numbers cross words, 1 was taken from each number, modulo 8.
    """
    if less_one and bits in ONES:
        words = words + ONES[bits]
    points = numbers_of(words.t(), bits)
    if less_one and bits not in ONES:
        points = (points + 1) & ((1 << bits) - 1)
    return points.t().contiguous()


def _group_index(files: Files, linear: str, words: int, groups: int, stated: Stated) -> Tensor:
    """The group of each channel, int64 [K]; from the config where the file leaves it out."""
    if files.holds(linear, "g_idx"):
        index = files.take(linear, "g_idx", ("I32", "I64", "int32", "int64"), 1).read().long()
        if len(index) == 0 or index.min() < 0 or index.max() >= groups:
            found = f"names groups {index.min()} to {index.max()}" if len(index) else "is empty"
            raise files.error(linear, "g_idx", found, f"0 to {groups - 1}, as there are scales")
        return index
    bits, group = (stated.number(linear, key) for key in ("bits", "group_size"))
    if stated.of(linear).get("desc_act") or not (
        isinstance(bits, int) and isinstance(group, int) and bits > 0 and group
    ):
        raise files.error(
            linear, "g_idx", "is missing", "it, or bits and group_size in quantization_config, without desc_act"
        )
    columns = words * 32 // bits
    index = torch.arange(columns) // (group if group > 0 else columns)
    if index[-1] != groups - 1:
        raise files.error(linear, "scales", f"has {groups} groups", f"{int(index[-1]) + 1} of {group} channels")
    return index
