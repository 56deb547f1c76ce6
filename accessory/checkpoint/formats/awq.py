"""How AWQ's files hold packed matrices: 4-bit numbers by input channel, the outputs in a word interleaved.

`qweight` int32 [K, N / 8], `qzeros` int32 [G, N / 8], `scales` fp16 [G, N]: w[n, k] = (q - point) * scale.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.formats.packed_groups import HALVES, INTEGERS, Files, by_rows, codes_of_numbers, computed
from accessory.checkpoint.formats.stated_packing import Stated
from accessory.checkpoint.lazy import LazyTensor, PackedTensor
from accessory.errors import CheckpointError
from accessory.quant.groups import group_storage

BITS = 4
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Of eight outputs in a word, the place of each: a word holds outputs 0, 2, 4, 6, 1, 3, 5, 7, lowest bits first."""


def packed_by_awq(tensors: dict[str, LazyTensor], stated: Stated, path: Path) -> dict[str, LazyTensor]:
    """Put each packed matrix and its statistics together, unchanged.

    Raises `CheckpointError` for another version or width, for a matrix whose parts are missing or strange, and where
    `stated` contradicts them.
    """
    config = stated.config
    version = config.get("version", config.get("checkpoint_format", config.get("format", "gemm")))
    bits = config.get("bits", config.get("w_bit", BITS))
    if str(version).lower() != "gemm" or bits != BITS:
        raise CheckpointError(
            f"{stated.file}: its quantization_config says version {version!r} and {bits} bits; expected gemm and "
            f"{BITS}, or the full-precision checkpoint and --quant."
        )
    files = Files(tensors, path)
    if not files.packed():
        raise CheckpointError(f"{path}: its quantization_config says awq; expected tensors called *.qweight.")
    for linear in files.packed():
        files.tensors[f"{linear}.weight"] = _matrix(files, linear, stated)
    return files.tensors


def _matrix(files: Files, linear: str, stated: Stated) -> PackedTensor:
    words = files.take(linear, "qweight", INTEGERS, 2)
    points = files.take(linear, "qzeros", INTEGERS, 2)
    scales = files.take(linear, "scales", HALVES, 2)
    columns, (groups, rows) = words.shape[0], scales.shape
    if words.shape[1] * 8 != rows:
        raise files.error(
            linear, "qweight", f"has {words.shape[1]} columns", f"{rows / 8:g}, for {rows} scales a group"
        )
    if points.shape != (groups, words.shape[1]):
        raise files.error(linear, "qzeros", f"has shape {list(points.shape)}", f"[{groups}, {words.shape[1]}]")
    if groups == 0 or columns == 0 or columns % groups:
        raise files.error(linear, "scales", f"has {groups} groups", f"a number that divides {columns} channels")
    stated.check(linear, BITS, columns // groups, columns)

    def zero_points() -> Tensor:
        """uint8 [N, G]."""
        found = interleaved(points.read())
        stated.check_points(linear, found, BITS)
        return found

    parts = codes_of_numbers(lambda: interleaved(words.read()), (rows, columns), BITS)
    parts["scales"] = by_rows(scales, f"{files.path}: {linear}.scales")
    parts["points"] = computed((rows, groups), "uint8", zero_points)
    kind = group_storage(BITS, columns // groups)
    return PackedTensor.of(parts, kind, (rows, columns), f"{files.path}: {linear}.weight")


def interleaved(words: Tensor) -> Tensor:
    """Words int32 [X, N / 8] -> their numbers uint8 [N, X]."""
    octets = words.contiguous().view(torch.uint8)
    pairs = torch.stack([octets & 15, octets >> 4], -1)
    return pairs.view(len(words), -1, 8)[:, :, list(PLACES)].flatten(1).t().contiguous()
