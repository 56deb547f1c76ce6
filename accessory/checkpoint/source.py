"""Opens whatever a user gives as `--pretrained_path` and shows its tensors under our names, unread."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from accessory.checkpoint.lazy import GgufTensor, InterleavedRows, LazyTensor, SafetensorsTensor
from accessory.checkpoint.torch_files import open_torch_shards, torch_shards
from accessory.errors import CheckpointError, explain_validation
from accessory.model.args import ModelArgs
from accessory.model.families import llama
from accessory.tokenizer.sniff import what_is

TRAINABLE_FILES = "trainable*.safetensors"
MODEL_FILES = "model*.safetensors"
SHARDED_FORMATS = ("Meta", "LLaMA2-Accessory")  # every file holds a slice of each matrix
KNOWN_FORMATS = (
    "a directory with model.safetensors and meta.json (Accessory), trainable.safetensors (Accessory, a trained part), "
    "config.json and *.safetensors (Hugging Face), consolidated.NN.pth (Meta), "
    "consolidated.NN-of-MM.model.pth (LLaMA2-Accessory), or a .gguf file"
)


@dataclass
class Source:
    """One opened checkpoint.

    path: what the user gave. format: its name. files: what holds the tensors. tensors: by our names, unread.
    settings: its own `config.json` or `params.json` in ModelArgs' terms (with a method's keys, if it holds any).
    llama_type: from `meta.json`, where there is one. is_delta: whether it is only the trained part of a model.
    """

    path: Path
    format: str
    files: list[Path]
    tensors: dict[str, LazyTensor]
    settings: dict[str, Any] | None = None
    llama_type: str | None = None
    is_delta: bool = False
    run: dict[str, Any] | None = field(default=None, repr=False)

    def fingerprint(self) -> str:
        """sha256 over each file's name, size, and first and last mebibyte: cheap, and moves with any retraining."""
        digest, span = hashlib.sha256(), 1 << 20
        for path in self.files:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}:".encode())
            with path.open("rb") as file:
                digest.update(file.read(span))
                file.seek(max(size - span, 0))
                digest.update(file.read(span))
        return digest.hexdigest()


def open_source(path: str | Path) -> Source:
    """Open one checkpoint directory or file. Raises `CheckpointError` saying what was found and what is known."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint. Expected {KNOWN_FORMATS}.")
    if path.is_file():
        if path.suffix == ".gguf":
            return _open_gguf(path)
        raise CheckpointError(f"{path}: found {what_is(path)}. Expected {KNOWN_FORMATS}.")
    if (path / "config.json").is_file() and "model_type" in read_json(path / "config.json"):
        return _open_hugging_face(path)
    for pattern, is_delta in ((TRAINABLE_FILES, True), (MODEL_FILES, False)):
        if files := sorted(path.glob(pattern)):
            return _open_ours(path, files, is_delta)
    if shards := torch_shards(path):
        return _open_torch(path, shards)
    present = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(f"{path}: found {present}. Expected {KNOWN_FORMATS}.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `CheckpointError` naming file and line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: found {what_is(path)}; expected a JSON object ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}; expected a JSON object.")
    return value


def _open_ours(path: Path, files: list[Path], is_delta: bool) -> Source:
    run = path / "run.json"
    return Source(
        path,
        "Accessory (trained part)" if is_delta else "Accessory",
        files,
        _open_safetensors(files, lambda name: name),
        settings=_settings(path),
        llama_type=_llama_type(path),
        is_delta=is_delta,
        run=read_json(run) if run.is_file() else None,
    )


def _open_torch(path: Path, shards: list[Path]) -> Source:
    tensors = open_torch_shards(shards)
    is_delta = "tok_embeddings.weight" not in tensors
    name = SHARDED_FORMATS["-of-" in shards[0].name]
    return Source(path, name, shards, tensors, _settings(path), _llama_type(path), is_delta)


def _open_hugging_face(path: Path) -> Source:
    config = read_json(path / "config.json")
    args = _args_of(path / "config.json", lambda: llama.args_from_hf(config, str(path / "config.json")))
    if "quantization_config" in config:
        raise CheckpointError(f"{path}: is already quantized; give the full-precision checkpoint and --quant instead.")
    index = path / "model.safetensors.index.json"
    files = [path / name for name in (_indexed_files(index) if index.is_file() else ["model.safetensors"])]
    if absent := [file.name for file in files if not file.is_file()]:
        present = ", ".join(sorted(p.name for p in path.iterdir())[:8])
        raise CheckpointError(f"{path}: {', '.join(absent)} is missing; found {present}.")
    tensors = _open_safetensors(files, llama.from_hf_name)
    if args.tie_word_embeddings:
        tensors.pop("output.weight", None)
    for name, tensor in tensors.items():
        if heads := llama.interleaved_heads(name, args):
            tensors[name] = InterleavedRows(tensor, heads)
    return Source(path, "Hugging Face", files, tensors, settings=args.model_dump())


def _indexed_files(index: Path) -> list[str]:
    """Names of the files of a sharded checkpoint, in order; they lie beside the index, never elsewhere."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: holds no 'weight_map'; expected one that names each tensor's file.")
    names = sorted({str(name) for name in weight_map.values()})
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index}: names {', '.join(outside)}; expected files beside it.")
    return names


def _args_of(file: Path, read: Callable[[], ModelArgs]) -> ModelArgs:
    """Settings read by `read`, whose complaints about what `file` says or lacks become one of ours."""
    try:
        return read()
    except KeyError as error:
        raise CheckpointError(f"{file}: {error} is missing; expected the model's settings.") from error
    except ValidationError as error:
        raise CheckpointError(explain_validation(error, str(file), ModelArgs.model_fields)) from error


def _open_gguf(path: Path) -> Source:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the package raises bare ValueErrors, IndexErrors and numpy's own
        raise CheckpointError(f"{path}: found {what_is(path)}; cannot be read as GGUF ({error}).") from error
    fields = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("tokenizer.")}
    tensors = {}
    for tensor in reader.tensors:
        if name := llama.from_gguf_name(tensor.name):
            _check_gguf_type(path, tensor)
            tensors[name] = GgufTensor(tensor, tuple(int(size) for size in reversed(tensor.shape)))
    names = {tensor.name for tensor in reader.tensors}
    args = _args_of(path, lambda: llama.args_from_gguf(fields, names, str(path)))
    return Source(path, "GGUF", [path], tensors, settings=args.model_dump())


def _check_gguf_type(path: Path, tensor: Any) -> None:
    import gguf

    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    if tensor.tensor_type not in plain and tensor.tensor_type not in gguf.quants._type_traits:
        raise CheckpointError(
            f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}, which cannot be read; "
            "expected F32, F16, BF16, Q8_0, Q4_K or another of gguf's common types."
        )


def _open_safetensors(files: list[Path], rename: Callable[[str], str | None]) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for path in files:
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: found {what_is(path)}; cannot be read as safetensors ({error}).") from error
        for key in file.keys():  # noqa: SIM118 - not a dictionary
            if name := rename(key):
                tensors[name] = SafetensorsTensor(file, key, tuple(file.get_slice(key).get_shape()))
    return tensors


def _settings(path: Path) -> dict[str, Any] | None:
    for name in ("config.json", "params.json"):
        if (path / name).is_file():
            return read_json(path / name)
    return None


def _llama_type(path: Path) -> str | None:
    meta = path / "meta.json"
    return read_json(meta).get("llama_type") if meta.is_file() else None


def model_args_of(source: Source) -> ModelArgs | None:
    """The ModelArgs part of a source's settings; None where the checkpoint has no settings file."""
    if source.settings is None:
        return None
    return ModelArgs(**{key: value for key, value in source.settings.items() if key in ModelArgs.model_fields})
