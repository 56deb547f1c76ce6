"""Which software packed the matrices of a Hugging Face directory, as its files say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accessory.checkpoint.formats.awq import packed_by_awq
from accessory.checkpoint.formats.bitsandbytes import packed_by_bitsandbytes
from accessory.checkpoint.formats.gptq import packed_by_gptq
from accessory.checkpoint.formats.greenbit import is_greenbit, packed_by_greenbit
from accessory.checkpoint.formats.stated_packing import Stated
from accessory.checkpoint.lazy import LazyTensor
from accessory.checkpoint.source import read_json
from accessory.errors import CheckpointError, nearest

_READERS = {"bitsandbytes": packed_by_bitsandbytes, "gptq": packed_by_gptq, "awq": packed_by_awq}
_OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ said how they packed, before config.json did."""
_AUTO_ROUND = ("auto-round", "intel/auto-round")
_PACKING_FORMATS = {
    "auto_round": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "auto_round:gptqmodel": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "auto_round:auto_gptq": {"quant_method": "gptq", "checkpoint_format": "gptq"},
    "auto_round:auto_awq": {"quant_method": "awq", "version": "gemm"},
}
"""AutoRound's name of a layout -> what others call it."""


def with_packed(tensors: dict[str, LazyTensor], stated: Any, path: Path) -> dict[str, LazyTensor]:
    """Put the parts of matrices together that other software packed; `stated`: config.json's quantization_config.

    Raises `CheckpointError` for a quantization that cannot be read.
    """
    file = path / "config.json"
    if not stated:
        file, stated = _stated_in_own_file(path)
    if not stated:
        return packed_by_greenbit(tensors, path) if is_greenbit(tensors) else tensors
    method = stated.get("quant_method") if isinstance(stated, dict) else stated
    if isinstance(method, str) and method in _AUTO_ROUND and isinstance(stated, dict):
        stated = stated | _of_auto_round(stated.get("packing_format"), path)
        method = stated["quant_method"]
    if not (isinstance(method, str) and method in _READERS and isinstance(stated, dict)):
        if method == "hqq":
            raise packed_by_hqq(path)
        raise CheckpointError(
            f"{path}: is quantized by {method!r}, which cannot be read; expected {', '.join(_READERS)}, a directory of "
            f"GreenBit's, or the full-precision checkpoint and --quant.{nearest(str(method), _READERS)}"
        )
    return _READERS[method](tensors, Stated(stated, file), path)


def packed_by_hqq(path: Path) -> CheckpointError:
    """The error for a directory that HQQ packed."""
    return CheckpointError(
        f"{path}: is quantized by HQQ, which cannot be read. Give the full-precision checkpoint instead, with --quant "
        "--quant_type int4_g64 (or int3_g64, int2_g64): like HQQ, that fits such groups without calibration text."
    )


def _stated_in_own_file(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """(the file that says how the matrices are packed, what it says)."""
    for name, method in _OWN_FILES.items():
        if (path / name).is_file():
            return path / name, {"quant_method": method, **read_json(path / name)}
    return path, None


def _of_auto_round(packing: object, path: Path) -> dict[str, str]:
    if not (isinstance(packing, str) and packing in _PACKING_FORMATS):
        raise CheckpointError(
            f"{path}: its quantization_config says packing_format {packing!r} of AutoRound; expected one of "
            f"{', '.join(_PACKING_FORMATS)}.{nearest(str(packing), _PACKING_FORMATS)}"
        )
    return _PACKING_FORMATS[packing]
