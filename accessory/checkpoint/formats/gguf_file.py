"""Reads GGUF files, as llama.cpp and what is built on it use them: every type that the `gguf` package dequantizes."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from accessory.checkpoint.lazy import LazyTensor, cut, finite
from accessory.checkpoint.naming import Tensors, ours_from_theirs
from accessory.checkpoint.source import Source, settings_read_by
from accessory.errors import CheckpointError
from accessory.model.args import ModelArgs, RopeScaling
from accessory.model.families import Architecture, architecture_of_gguf
from accessory.model.families.architecture import ACTIVATIONS, Fused
from accessory.model.position import rotary_frequencies
from accessory.tokenizer.gguf_metadata import MetadataWalk
from accessory.tokenizer.sniff import what_is

PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
SIZES = {
    "dim": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "hidden_dim": "feed_forward_length",
    "max_seq_len": "context_length",
    "rotary_dim": "rope.dimension_count",
}
"""Our setting -> GGUF's key, behind the name of the architecture."""
_OPTIONAL = ("n_kv_heads", "head_dim", "rotary_dim", "max_seq_len")
EPSILON = {"rms": "attention.layer_norm_rms_epsilon", "layer": "attention.layer_norm_epsilon"}
_NEVER = {"expert_count": "a mixture of experts", "attention.scale": "a scale of attention of its own"}
"""Key that must be absent or zero -> the feature that no model here has."""
EMBEDDING, FACTORS = "token_embd.weight", "rope_freqs.weight"
_PUBLISHED_FACTORS = (8.0, 32.0)  # Llama 3.1 and 3.2
_ORIGINAL_CONTEXTS = (8192, *(1 << power for power in range(4, 21)))
_MOST_DIMENSIONS = 4
_LONGEST_CONTEXT = 2**31 - 1


class GgufTensor(LazyTensor):
    """A tensor of a memory-mapped GGUF file, its bytes as [rows, bytes of a row] (uint8); `dtype` is GGUF's name of it.

    Blocks come back as fp32; F32, F16 and BF16 as they are, sharing the file's memory. name: for errors.
    """

    def __init__(self, data: np.ndarray, kind: Kind, shape: tuple[int, ...], name: str) -> None:
        self.data, self.kind, self.shape, self.name, self.dtype = data, kind, shape, name, kind.name

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Dequantize the rows asked for; a range of columns needs the whole rows first.

        Raises `CheckpointError` for blocks whose scales are infinite or NaN.
        """
        by_rows = dim == 0 and len(self.shape) > 1
        depth = math.prod(self.shape[1:-1])
        values = _values(self.data[start * depth : stop * depth] if by_rows else self.data, self.kind)
        values = values if self.kind in PLAIN else finite(values, self.name)
        values = values.reshape(-1, *self.shape[1:])
        return values if by_rows else cut(values, dim, start, stop)


def _values(rows: np.ndarray, kind: Kind) -> Tensor:
    if kind not in PLAIN:
        return torch.from_numpy(gguf.dequantize(rows, kind))
    dtype = PLAIN[kind]
    if rows.ctypes.data % dtype.itemsize:  # a file may align its tensors to single bytes
        rows = rows.copy()
    return torch.from_numpy(rows).view(dtype)


def open_gguf_file(path: Path) -> Source:
    """Open a GGUF file. Raises `CheckpointError` for what is none, is cut short, or holds what cannot be computed."""
    fields, theirs = _read(path)
    architecture = architecture_of_gguf(fields.get("general.architecture"), str(path))
    args = args_of(fields, theirs, architecture, path)
    tensors = ours_from_theirs(theirs, architecture.gguf.names, args, str(path))
    return Source(path, "GGUF", [path], tensors, settings=args.model_dump(), llama_type=architecture.family)


@dataclass(frozen=True)
class _Entry:
    """What a file says of one tensor. shape: as torch has it. start: bytes from the beginning of the tensors."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


class _Header(MetadataWalk):
    """Metadata, followed by the list of tensors."""

    def entries(self) -> list[_Entry]:
        """The list of tensors. Raises `ValueError` for one without or with too many dimensions."""
        (count,) = struct.unpack_from("<Q", self._buffer, 8)
        return [self._entry() for _ in range(count)]

    def _entry(self) -> _Entry:
        name = self._string()
        (dimensions,) = self._unpack("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = self._unpack(f"<{dimensions}Q")
        return _Entry(name, shape[::-1], *self._unpack("<IQ"))

    def data_start(self, alignment: object) -> int:
        """Where the tensors' data begin, in bytes, after what was read so far. Raises `ValueError`."""
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}")
        return -(-self._at // alignment) * alignment


def _read(path: Path) -> tuple[dict[str, Any], Tensors]:
    """(metadata, tensors by the names of the file); no tensor passes the end of the file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            header = _Header(buffer)
            fields, entries = header.metadata(), header.entries()
            start = header.data_start(fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT))
    except (OSError, ValueError, struct.error, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: found {what_is(path)}; expected a GGUF file (version 2 or 3), whole and undamaged ({error})."
        ) from error
    _check_whole(fields, entries, path)
    # Copy-on-write, since torch has no read-only tensors.
    content = np.asarray(np.memmap(path, mode="c"))[start:]
    return fields, {entry.name: _tensor(entry, content, path) for entry in entries}


def _check_whole(fields: dict[str, Any], entries: list[_Entry], path: Path) -> None:
    parts = fields.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(f"{path}: is one of {parts} parts; expected one file (`llama-gguf-split --merge`).")
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{path}: holds {twice} twice.")


def _tensor(entry: _Entry, content: np.ndarray, path: Path) -> GgufTensor:
    kind = _kind(entry, path)
    block, width = gguf.GGML_QUANT_SIZES[kind]
    if 0 in entry.shape or entry.shape[-1] % block:
        raise CheckpointError(
            f"{path}: {entry.name} has shape {entry.shape}; expected rows of {kind.name} in blocks of {block}."
        )
    row = entry.shape[-1] // block * width
    size = math.prod(entry.shape[:-1]) * row
    if entry.start + size > len(content):
        raise CheckpointError(
            f"{path}: found {what_is(path)}, cut short or damaged: {entry.name} takes {size:,} bytes "
            f"from {entry.start:,} on, but {len(content):,} bytes of tensors are there."
        )
    return GgufTensor(
        content[entry.start : entry.start + size].reshape(-1, row), kind, entry.shape, f"{path}: {entry.name}"
    )


def _kind(entry: _Entry, path: Path) -> Kind:
    known = entry.kind in Kind.__members__.values()
    if known and _can_be_read(Kind(entry.kind)):
        return Kind(entry.kind)
    name = Kind(entry.kind).name if known else f"type {entry.kind}"
    raise CheckpointError(
        f"{path}: {entry.name} is stored as {name}, which cannot be read; expected F32, F16, BF16, Q8_0, Q4_K or "
        "another of gguf's common types."
    )


@cache
def _can_be_read(kind: Kind) -> bool:
    if kind in PLAIN:
        return True
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:  # how the package says so: it has no list of what it dequantizes
        return False
    return True


def args_of(fields: dict[str, Any], theirs: Tensors, architecture: Architecture, path: Path) -> ModelArgs:
    """The settings that metadata and tensors tell. Raises `CheckpointError`."""
    prefix = f"{architecture.gguf.architecture}."
    stated = {key.removeprefix(prefix): _one(value) for key, value in fields.items() if key.startswith(prefix)}
    if EMBEDDING not in theirs:
        raise CheckpointError(f"{path}: {EMBEDDING} is missing; expected a language model.")
    for key, meaning in _NEVER.items():
        if stated.get(key):
            raise CheckpointError(f"{path}: {prefix}{key} is {stated[key]!r}: {meaning} is not supported.")
    values = _sizes(stated, theirs, prefix, path) | _told_by_tensors(theirs, architecture)
    values["architecture"] = architecture.name
    if "activation" in architecture.keys:
        values["activation"] = ACTIVATIONS[architecture.defaults["activation"]]
    if "parallel_residual" in architecture.keys:
        values["parallel_residual"] = stated.get("use_parallel_residual", architecture.defaults["parallel_residual"])
    values |= dict(architecture.fixed) | {"rotary_layout": architecture.gguf.rotary_layout}
    if positions := architecture.gguf.positions:
        if values["n_layers"] not in positions:
            known = " or ".join(f"{blocks} ({position})" for blocks, position in positions.items())
            raise CheckpointError(
                f"{path}: has {values['n_layers']} blocks; expected {known}: llama.cpp tells the positions of a "
                f"{architecture.gguf.architecture} by that number."
            )
        values["position"] = positions[values["n_layers"]]
    values["norm_eps"] = _positive(stated, EPSILON[values.get("norm", "rms")], None, prefix, path)
    if values.get("position", "rotary") == "rotary":
        values["rope_theta"] = _positive(stated, "rope.freq_base", 10000.0, prefix, path)
        values["rope_scaling"] = _linear_scaling(stated, prefix, path)
    args = settings_read_by(lambda: ModelArgs(**values), path)
    _check_heads(args, stated, theirs, path)
    return _with_factors(args, theirs, path)


def _one(value: Any) -> Any:
    """The value of a list that repeats it for each block; any other value as it is."""
    return value[0] if isinstance(value, list) and value and all(v == value[0] for v in value) else value


def _sizes(stated: dict[str, Any], theirs: Tensors, prefix: str, path: Path) -> dict[str, Any]:
    """Sizes, checked against those of the tensors: a damaged one could ask for any amount of memory."""
    widest = max(max(tensor.shape) for tensor in theirs.values())
    most = {"n_layers": len(theirs), "max_seq_len": _LONGEST_CONTEXT}
    values = {}
    for name, key in SIZES.items():
        if key not in stated and name in _OPTIONAL:
            continue
        if key not in stated:
            raise CheckpointError(f"{path}: {prefix}{key} is missing; expected the model's settings.")
        value, limit = stated[key], most.get(name, widest)
        if type(value) is not int or not 1 <= value <= limit:
            raise CheckpointError(f"{path}: {prefix}{key} is {value!r}; its tensors allow 1 to {limit}.")
        values[name] = value
    return values


def _told_by_tensors(theirs: Tensors, architecture: Architecture) -> dict[str, Any]:
    biased, modules = set(), set()
    for name in theirs:
        found = architecture.gguf.names.ours(name)
        if found:
            parts = found[0].parts if isinstance(found[0], Fused) else (found[0],)
            modules.update(parts)
            biased.update(part.rsplit(".", 1)[-1] for part in parts if found[1] == "bias")
    return {
        "vocab_size": theirs[EMBEDDING].shape[0],
        "tie_word_embeddings": "output" not in modules,
        "qkv_bias": "wq" in biased,
        "out_bias": "wo" in biased,
        "mlp_bias": "w2" in biased,
    }


def _positive(stated: dict[str, Any], key: str, default: float | None, prefix: str, path: Path) -> float:
    value = stated.get(key, default)
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"{path}: {prefix}{key} is {value!r}; expected a number above 0.")
    return as_float32(value)


def as_float32(value: float) -> float:
    """The number with the fewest digits that the file's 32 bits stand for: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _linear_scaling(stated: dict[str, Any], prefix: str, path: Path) -> dict[str, Any] | None:
    kind = stated.get("rope.scaling.type", "linear")
    key = "rope.scaling.factor" if "rope.scaling.factor" in stated else "rope.scale_linear"
    if kind not in ("none", "linear"):
        raise CheckpointError(f"{path}: rope scaling {kind!r} is not supported; known: none, linear, llama3.")
    if kind == "none" or not stated.get(key):
        return None
    factor = _positive(stated, key, None, prefix, path)
    return {"kind": "linear", "factor": factor} if factor != 1 else None


def _check_heads(args: ModelArgs, stated: dict[str, Any], theirs: Tensors, path: Path) -> None:
    if args.n_heads * args.head_dim > max(max(tensor.shape) for tensor in theirs.values()):
        raise CheckpointError(f"{path}: {args.n_heads} heads of {args.head_dim} channels are more than any tensor has.")
    width = stated.get("attention.value_length", args.head_dim)
    if width != args.head_dim:
        raise CheckpointError(f"{path}: keys of {args.head_dim} channels and values of {width} are not supported.")


def _with_factors(args: ModelArgs, theirs: Tensors, path: Path) -> ModelArgs:
    """`args` with the rope scaling that the file's factors on the wavelengths come from: Llama 3's, as no other has."""
    if FACTORS not in theirs:
        return args
    factors = theirs[FACTORS].read().float()
    expected = f"expected those of Llama 3's scaling, {args.rotary_dim // 2} numbers (factor 8 or 32)"
    if args.position != "rotary" or args.rope_scaling or factors.shape != (args.rotary_dim // 2,):
        raise CheckpointError(f"{path}: {FACTORS} of shape {tuple(factors.shape)} does not fit; {expected}.")
    if torch.equal(factors, torch.ones_like(factors)):
        return args
    known = (*_PUBLISHED_FACTORS, as_float32(round(float(factors.max()), 3)))
    for context, factor in product(_ORIGINAL_CONTEXTS, known):
        scaling = RopeScaling(kind="llama3", factor=factor, original_max_position_embeddings=context)
        scaled = args.model_copy(update={"rope_scaling": scaling})
        if torch.allclose(factors, wavelength_factors(scaled), rtol=1e-4):
            return scaled
    raise CheckpointError(
        f"{path}: {FACTORS} runs from {factors.min():g} to {factors.max():g} in a way that is not known; {expected}."
    )


def wavelength_factors(args: ModelArgs) -> Tensor:
    """How much longer each wavelength is than without scaling, fp32 [rotary_dim / 2]."""
    return rotary_frequencies(args.model_copy(update={"rope_scaling": None})) / rotary_frequencies(args)
