"""Writes GGUF files, for llama.cpp and what is built on it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from accessory.checkpoint.formats.gguf_file import (
    EPSILON,
    FACTORS,
    PLAIN,
    SIZES,
    args_of,
    as_float32,
    wavelength_factors,
)
from accessory.checkpoint.formats.gguf_grids import encoded, is_rounded, kind_of
from accessory.checkpoint.lazy import HeldTensor, PackedTensor
from accessory.checkpoint.naming import Tensors, theirs_from_ours
from accessory.checkpoint.save import fresh
from accessory.checkpoint.whole import WholeModel, progress
from accessory.errors import CheckpointError, nearest
from accessory.model.args import ModelArgs
from accessory.model.families import ARCHITECTURES, Architecture
from accessory.model.families.architecture import inexpressible
from accessory.model.families.llama import BIASES
from accessory.tokenizer.gguf_differences import differences
from accessory.tokenizer.gguf_fields import add_fields, vocabulary_fields
from accessory.tokenizer.sniff import what_is

FileType = Literal["f32", "f16", "bf16", "q8_0", "packed"]
_WRITTEN = {
    "f32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "packed": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
}
_LABELS = {
    Kind.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Kind.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
}


def write_gguf(model: WholeModel, target: Path, file_type: FileType) -> None:
    """Write a model as the new file `target`, tensor by tensor.

    Vectors are written as F32, as llama.cpp wants them, matrices as `file_type`; under q8_0, which packs 32 values of
    a row at a time, matrices of another width as F16. "packed" keeps whole numbers in groups where GGUF has a type for
    them, and says how many are written as F16. The file appears under its name when it is complete.
    Raises `CheckpointError` for a model that the format has no place for, and `TokenizerError` for a tokenizer.
    """
    if file_type not in _WRITTEN:
        raise CheckpointError(
            f"A GGUF file of type {file_type!r} cannot be written.{nearest(str(file_type), _WRITTEN)} "
            f"Known: {', '.join(_WRITTEN)}."
        )
    if target.exists():
        raise CheckpointError(f"{target}: found {what_is(target)} there; expected a new file.")
    architecture = ARCHITECTURES[model.args.architecture]
    try:
        fields, theirs = _laid_out(model, architecture, target)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {_way_out(model, target)}") from error
    vocabulary = vocabulary_fields(model.tokenizer, model.args.vocab_size)
    kept = _kept_kinds(theirs, target) if file_type == "packed" else {}
    with fresh(target) as partial:
        _write(partial, target.stem, architecture, fields | vocabulary, theirs, file_type, kept)
    for difference in differences(model.tokenizer):
        print(f"{target}: llama.cpp {difference}.")
    window = model.args.sliding_window
    if window and window < model.args.max_seq_len:
        print(
            f"{target}: states a context of {window} tokens, the model's sliding window, not {model.args.max_seq_len}: "
            "llama.cpp has no sliding window for this model, and computes the same only within one."
        )


def _laid_out(model: WholeModel, architecture: Architecture, target: Path) -> tuple[dict[str, Any], Tensors]:
    """The fields and tensors of a file of `architecture`. Raises `CheckpointError` for what would be lost in it."""
    if architecture.gguf is None:
        raise CheckpointError(f"{target}: llama.cpp has no {architecture.name}.")
    model = model.in_layout(architecture.gguf.rotary_layout)
    args, tensors = _within_context(model.args), model.tensors
    if "tok_embeddings.weight" not in tensors:
        raise CheckpointError(f"{target}: cannot be written: the model has no embedding.")
    if args.tie_word_embeddings and not architecture.gguf.tied:
        args = args.model_copy(update={"tie_word_embeddings": False})
        tensors = {**tensors, "output.weight": tensors["tok_embeddings.weight"]}
    theirs = theirs_from_ours(tensors, architecture.gguf.names, args)
    if architecture.gguf.rope_factors and args.rope_scaling and args.rope_scaling.kind == "llama3":
        theirs = {FACTORS: HeldTensor(wavelength_factors(args)), **theirs}
    fields = _fields(args, architecture)
    _check_nothing_lost(args, fields, theirs, architecture, target)
    return fields, theirs


def _way_out(model: WholeModel, target: Path) -> str:
    """A sentence on which architecture or format to write instead, if the model's own would lose something."""
    for architecture in ARCHITECTURES.values():
        with suppress(CheckpointError):
            _laid_out(model, architecture, target)
            return f"As {architecture.name} it computes the same: give --architecture {architecture.name}."
    return "None of llama.cpp's architectures known here computes the same; write it --to hf."


def _kept_kinds(theirs: Tensors, target: Path) -> dict[str, Kind]:
    """Of packed matrices, the types that hold them. Raises `CheckpointError` where nothing is packed."""
    packed = [name for name, tensor in theirs.items() if isinstance(tensor, PackedTensor)]
    if not packed:
        raise CheckpointError(f"{target}: --gguf_type packed writes a base as it is packed; nothing is packed.")
    kinds = {name: kind for name in packed if (kind := kind_of(theirs[name]))}
    if others := [name for name in packed if name not in kinds]:
        print(
            f"{target}: no type of GGUF holds {len(others)} of {len(packed)} packed matrices ({others[0]} is one): "
            "they are dequantized and written as F16."
        )
    if rounded := [name for name, kind in kinds.items() if is_rounded(theirs[name], kind)]:
        print(
            f"{target}: zeros of {len(rounded)} matrices, whole points times scales, are rounded to the fp16 of Q4_1, "
            "by at most 0.05 % of themselves."
        )
    return kinds


def _within_context(args: ModelArgs) -> ModelArgs:
    """The settings without those that GGUF cannot state and that change nothing within the context.

    With a sliding window the window becomes the context: within it every token attends to all tokens before it.
    """
    update: dict[str, Any] = {}
    if args.rope_scaling and args.rope_scaling.kind == "dynamic":
        update["rope_scaling"] = None
    if args.sliding_window:
        update |= {"sliding_window": None, "sliding_layers": None}
        update["max_seq_len"] = min(args.sliding_window, args.max_seq_len)
    return args.model_copy(update=update)


def _fields(args: ModelArgs, architecture: Architecture) -> dict[str, Any]:
    stated = {key: getattr(args, name) for name, key in SIZES.items()}
    stated |= {
        "vocab_size": args.vocab_size,
        "attention.value_length": args.head_dim,
        EPSILON[args.norm]: float(args.norm_eps),
    }
    if args.position == "rotary":
        stated["rope.freq_base"] = float(args.rope_theta)
        if args.rope_scaling and args.rope_scaling.kind == "linear":
            stated |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(args.rope_scaling.factor)}
    else:
        del stated["rope.dimension_count"]
    if "parallel_residual" in architecture.keys:
        stated["use_parallel_residual"] = args.parallel_residual
    return {f"{architecture.gguf.architecture}.{key}": value for key, value in stated.items()}


def _check_nothing_lost(
    args: ModelArgs, fields: dict[str, Any], theirs: Tensors, architecture: Architecture, target: Path
) -> None:
    """Raise `CheckpointError` naming the settings that llama.cpp would not find in the file, or would ignore."""
    reread = args_of(fields, theirs, architecture, target)
    rounded = {"norm_eps": as_float32(args.norm_eps), "rope_theta": as_float32(args.rope_theta)}
    if args.rope_scaling:
        rounded["rope_scaling"] = args.rope_scaling.model_copy(update={"factor": as_float32(args.rope_scaling.factor)})
    lost = architecture.lost(_comparable(args.model_copy(update=rounded)), _comparable(reread))
    form = architecture.gguf
    lost += [bias for bias in BIASES if getattr(args, bias) and bias not in form.biases]
    if args.n_heads * args.head_dim != args.dim and not form.wide_heads:
        lost.append("head_dim")
    if args.position == "rotary" and args.rotary_dim != args.head_dim and not form.partial_rotary:
        lost.append("rotary_dim")
    if lost:
        place = f"{target}: a GGUF file of architecture {architecture.gguf.architecture}"
        raise inexpressible(place, lost, args)


def _comparable(args: ModelArgs) -> ModelArgs:
    """Without the settings that say nothing of this model: those of a rotation where nothing rotates."""
    still = {"rope_theta": 10000.0, "rope_scaling": None, "rotary_dim": args.head_dim}
    return args if args.position == "rotary" else args.model_copy(update=still)


def _write(
    path: Path,
    name: str,
    architecture: Architecture,
    fields: Mapping[str, Any],
    theirs: Tensors,
    file_type: FileType,
    kept: Mapping[str, Kind],
) -> None:
    kind, label = _WRITTEN[file_type]
    if kept:
        label = _LABELS[Counter(kept.values()).most_common(1)[0][0]]
    writer = gguf.GGUFWriter(path, architecture.gguf.architecture)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_file_type(label)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_fields(writer, fields)
        kinds = {name: kept.get(name) or _stored_as(tensor.shape, kind) for name, tensor in theirs.items()}
        for name, tensor in theirs.items():
            block, width = gguf.GGML_QUANT_SIZES[kinds[name]]
            size = math.prod(tensor.shape) // block * width
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in progress(theirs, "writing GGUF"):
            packed = encoded(tensor, kinds[name]) if name in kept else _encoded(name, tensor.read(), kinds[name])
            writer.write_tensor_data(packed)
    finally:
        writer.close()


def _stored_as(shape: tuple[int, ...], wanted: Kind) -> Kind:
    if len(shape) == 1:
        return Kind.F32
    return Kind.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def _encoded(name: str, value: Tensor, kind: Kind) -> np.ndarray:
    """`value` as the bytes of `kind`, in any dtype."""
    if kind not in PLAIN:
        return gguf.quantize(value.float().contiguous().numpy(), kind)
    plain = value.to(PLAIN[kind]).contiguous()
    if kind == Kind.F16 and not plain.isfinite().all():
        raise CheckpointError(f"{name} has values that do not fit into F16; write f32 or bf16.")
    return plain.view(torch.uint8).numpy()
