"""Hugging Face directories: config.json and safetensors or .bin files, plain or packed by others (`with_packed`)."""

from __future__ import annotations

from pathlib import Path

from accessory.checkpoint.formats.packed_elsewhere import packed_by_hqq, with_packed
from accessory.checkpoint.formats.torch_shards import load_torch_file
from accessory.checkpoint.lazy import HeldTensor, LazyTensor, PackedTensor, UnpackedTensor, unit_rows
from accessory.checkpoint.merge import base_has_bias
from accessory.checkpoint.naming import ours_from_theirs
from accessory.checkpoint.source import Source, first_file, open_safetensors, present, read_json, settings_read_by
from accessory.checkpoint.vision_part import vision_source
from accessory.errors import CheckpointError, is_file
from accessory.model.args import ModelArgs
from accessory.model.families import architecture_of
from accessory.model.families.architecture import Architecture, Config

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
HQQ = "qmodel.pt"
"""Where HQQ's own library keeps a model, in the place of these."""


def open_hugging_face(path: Path) -> Source:
    """Open a directory whose config.json names a model type. Raises `CheckpointError`."""
    file = path / "config.json"
    config = read_json(file)
    described = read_config(config, file)
    files = _weight_files(path)
    return source_of(path, config, described, open_weight_files(files), files)


def open_encoder(path: Path) -> Source:
    """Open a directory whose config.json names the model type of an image encoder. Raises `CheckpointError`."""
    files = _weight_files(path)
    return vision_source(path, read_json(path / "config.json"), open_weight_files(files), files)


def read_config(config: Config, file: Path) -> tuple[Architecture, ModelArgs]:
    """The model type and settings that a config.json states; `file` names it. Raises `CheckpointError`."""
    architecture = architecture_of(config.get("model_type"), str(file))
    return architecture, settings_read_by(lambda: architecture.read(config, str(file)), file)


def source_of(
    path: Path,
    config: Config,
    described: tuple[Architecture, ModelArgs],
    theirs: dict[str, LazyTensor],
    files: list[Path],
) -> Source:
    """The checkpoint of the tensors `theirs`, by the names they have there; `described`: as `read_config` gives it.

    Raises `CheckpointError` for a quantization that cannot be read.
    """
    architecture, args = described
    theirs = with_packed(theirs, config.get("quantization_config"), path)
    tensors = without_needless_biases(ours_from_theirs(theirs, architecture.names, args, str(path)), args)
    notes: tuple[str, ...] = ()
    if architecture.unit_head_key in config and (head := tensors.get("output.weight")):
        tensors["output.weight"] = unit_rows(head)
        notes = ("the rows of its head are scaled to length 1 as they are read, and not again in training",)
    if unpacked := sum(isinstance(tensor, UnpackedTensor) for tensor in theirs.values()):
        notes += (f"{unpacked} matrices of 8 bits are read as plain weights; --quant packs them again",)
    settings, family = args.model_dump(), architecture.family
    return Source(path, "Hugging Face", files, tensors, settings=settings, llama_type=family, notes=notes)


def without_needless_biases(tensors: dict[str, LazyTensor], args: ModelArgs) -> dict[str, LazyTensor]:
    """Without the zeros that AutoGPTQ and GreenBit write as the bias of packed linears which have none."""

    def needless(name: str) -> bool:
        """Whether the tensor is such a bias."""
        module, _, leaf = name.rpartition(".")
        packed = leaf == "bias" and isinstance(tensors.get(f"{module}.weight"), PackedTensor | UnpackedTensor)
        return packed and not base_has_bias(module, args) and not tensors[name].read().any()

    return {name: tensor for name, tensor in tensors.items() if not needless(name)}


def _weight_files(path: Path) -> list[Path]:
    """A sharded checkpoint's files, in order, lie beside the index that names them, never elsewhere."""
    index = next((path / name for name in INDEXES if (path / name).is_file()), None)
    if index is None and (path / HQQ).is_file():
        raise packed_by_hqq(path)
    if index is None:
        return [first_file(path, SINGLES)]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: holds no 'weight_map'; expected one that names each tensor's file.")
    names = sorted({str(name) for name in weight_map.values()})
    if outside := [name[:80] for name in names if Path(name).name != name or len(name.encode()) > 255]:
        raise CheckpointError(f"{index}: names {', '.join(outside)}; expected files beside it.")
    if absent := [name for name in names if not is_file(path / name)]:
        raise CheckpointError(f"{path}: {', '.join(absent)} is missing; found {present(path)}.")
    return [path / name for name in names]


def open_weight_files(files: list[Path]) -> dict[str, LazyTensor]:
    """Every tensor of safetensors or .bin files by the name it has there. Raises `CheckpointError` for others."""
    if files[0].suffix != ".bin":
        return open_safetensors(files)
    return {name: HeldTensor(tensor) for file in files for name, tensor in load_torch_file(file).items()}
