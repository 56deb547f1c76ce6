"""An opened checkpoint, whatever its format: tensors under our names, unread, and what its files say of the model."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from accessory.checkpoint.lazy import ComputedTensor, LazyTensor, PackedTensor, ShardedTensor
from accessory.errors import CheckpointError, explain_validation
from accessory.model.args import ModelArgs
from accessory.quant import PackedWeight
from accessory.tokenizer.sniff import what_is
from accessory.tokenizer.special import read_object
from accessory.vision import Vision

STRATEGY_FILE = "quant_strategy.json"
"""In a directory: how many bits each linear of a mix has (see `accessory.checkpoint.strategy`)."""


@dataclass
class Source:
    """One opened checkpoint.

    path: what the user gave. format: its name. files: what holds the tensors. tensors: by our names, unread.
    settings: its own `config.json` or `params.json` in ModelArgs' terms (with a method's keys, if it holds any).
    llama_type: family and method, where its files say so. is_delta: whether it is only the trained part of a model.
    is_difference: whether its tensors are added to those before them. run: its run.json. prompt_layouts, system: how
    questions were laid out in training, and the system's words before most of them, as its files say. base: the base
    that its files name, where they have no run.json. vision: the image encoder that its files describe. is_vision:
    whether it is that alone, which is a part.
    """

    path: Path
    format: str
    files: list[Path]
    tensors: dict[str, LazyTensor]
    settings: dict[str, Any] | None = None
    llama_type: str | None = None
    is_delta: bool = False
    is_difference: bool = False
    run: dict[str, Any] | None = field(default=None, repr=False)
    prompt_layouts: tuple[str, ...] = ()
    system: str | None = None
    base: Path | None = None
    notes: tuple[str, ...] = ()
    vision: Vision | None = None
    is_vision: bool = False

    @property
    def rotary_layout(self) -> str:
        """ModelArgs' `rotary_layout`; pairs, as in Meta's files, if not stated. Raises `CheckpointError` for others."""
        layout = (self.settings or {}).get("rotary_layout", "pairs")
        if layout not in ("pairs", "halves"):
            raise CheckpointError(
                f"{self.path}: its settings' 'rotary_layout' is {layout!r}; expected pairs or halves."
            )
        return layout

    @property
    def is_sharded(self) -> bool:
        """Whether every file holds a slice of each matrix."""
        return any(isinstance(tensor, ShardedTensor) for tensor in self.tensors.values())

    @property
    def storage(self) -> str | None:
        """Name of the storage format of its first packed matrix; None for plain weights."""
        return next((kind.name for kind in self.storages.values()), None)

    @property
    def storage_names(self) -> str:
        """Names of all storage formats of its matrices, that of most first; empty for plain weights."""
        return ", ".join(name for name, _ in Counter(kind.name for kind in self.storages.values()).most_common())

    @property
    def storages(self) -> dict[str, type[PackedWeight]]:
        """The matrices that are packed already, by our names -> how; they may differ."""
        return {name: tensor.storage for name, tensor in self.tensors.items() if isinstance(tensor, PackedTensor)}

    def fingerprint(self) -> str:
        """sha256 over each file's name, size, and first and last mebibyte: cheap, and another after any retraining.

        A base packed as a mix is another one with another strategy.
        """
        digest, span = hashlib.sha256(), 1 << 20
        strategy = self.path / STRATEGY_FILE
        for path in [*self.files, *([strategy] if strategy.is_file() else [])]:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}:".encode())
            with path.open("rb") as file:
                digest.update(file.read(span))
                file.seek(max(size - span, 0))
                digest.update(file.read(span))
        return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `CheckpointError` naming file and line."""
    return read_object(path, CheckpointError)


def present(path: Path) -> str:
    """The first names in a directory, for messages."""
    return ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"


def first_file(path: Path, names: Iterable[str]) -> Path:
    """The first of the files `names` that the directory `path` holds. Raises `CheckpointError` if it holds none."""
    if found := next((path / name for name in names if (path / name).is_file()), None):
        return found
    raise CheckpointError(f"{path}: {' or '.join(names)} is missing; found {present(path)}.")


def stated_settings(path: Path) -> dict[str, Any] | None:
    """What config.json or params.json of a directory says; None where there is neither."""
    for name in ("config.json", "params.json"):
        if (path / name).is_file():
            return read_json(path / name)
    return None


def stated_llama_type(path: Path) -> str | None:
    """`llama_type` of a directory's meta.json; None where it has none."""
    meta = path / "meta.json"
    llama_type = read_json(meta).get("llama_type") if meta.is_file() else None
    if not isinstance(llama_type, str | None):
        raise CheckpointError(f"{meta}: 'llama_type' is {llama_type!r}; expected a name.")
    return llama_type


def settings_read_by(read: Callable[[], ModelArgs], file: Path) -> ModelArgs:
    """The result of `read`, which reads `file`; what it raises for missing or wrong settings becomes our error."""
    try:
        return read()
    except KeyError as error:
        raise CheckpointError(f"{file}: {error} is missing; expected the model's settings.") from error
    except ValidationError as error:
        raise CheckpointError(explain_validation(error, str(file), ModelArgs.model_fields)) from error
    except (TypeError, ZeroDivisionError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{file}: its settings do not make a model ({error}).") from error


def open_safetensors(files: list[Path]) -> dict[str, LazyTensor]:
    """Every tensor of the files by the name it has there. Raises `CheckpointError` for what is not safetensors."""
    tensors: dict[str, LazyTensor] = {}
    for path in files:
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: found {what_is(path)}; cannot be read as safetensors ({error}).") from error
        for key in file.keys():  # noqa: SIM118 - not a dictionary
            view = file.get_slice(key)
            tensors[key] = ComputedTensor(tuple(view.get_shape()), view.get_dtype(), partial(_read_mapped, file, key))
    return tensors


def _read_mapped(file: safe_open, key: str, dim: int | None, start: int, stop: int) -> Tensor:
    if dim is None:
        return file.get_tensor(key)
    return file.get_slice(key)[(slice(None),) * dim + (slice(start, stop),)]


def model_args_of(source: Source) -> ModelArgs | None:
    """The ModelArgs part of a source's settings; None where the checkpoint has no settings file."""
    if source.settings is None:
        return None
    return ModelArgs(**{key: value for key, value in source.settings.items() if key in ModelArgs.model_fields})
