"""Arguments of `MetaModel`'s calls: what they may be, and what an error says of those that cannot be."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, Field, ValidationError

from accessory.blueprint import DTYPES
from accessory.errors import ConfigError, explain_validation, nearest
from accessory.foreign_names import unknown

Paths = str | Path | Sequence[str | Path]
Settings = Paths | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]]
"""Of `llama_config`: files, settings themselves, or both, of which the last one that states a key counts."""
_UPSTREAMS = {
    "mp_group": ": layout=groups.start(model_parallel_size=N), of accessory.parallel, cuts the model over ranks.",
}
"""What LLaMA2-Accessory's `from_pretrained` takes beside ours, and what to write instead."""
_Arguments = TypeVar("_Arguments", bound=BaseModel)


class Loading(BaseModel):
    """Arguments of `MetaModel.from_pretrained` that are checked here."""

    llama_type: str | None
    tokenizer_path: Path | None
    max_seq_len: int = Field(ge=2)
    quant_type: str | None


def as_paths(given: Paths) -> list[Path]:
    """One path or several, as `Path`s; an empty text is none. Raises `ConfigError` for what is neither."""
    given = [given] if isinstance(given, str | Path) else given
    if not isinstance(given, Sequence) or not all(isinstance(path, str | Path) for path in given):
        raise ConfigError(f"a path is {given!r}; expected a text or a Path, or a list of some.")
    return [Path(path) for path in given if path != ""]


def as_settings(given: Settings) -> list[Path | Mapping[str, Any]]:
    """`given` as a list of paths and settings. Raises `ConfigError` for what is neither."""
    if isinstance(given, Mapping):
        return [given]
    if isinstance(given, str | Path):
        return as_paths(given)
    if not isinstance(given, Sequence):
        raise ConfigError(f"llama_config is {given!r}; expected a file, settings, or a list of some.")
    return [part for each in given for part in ([each] if isinstance(each, Mapping) else as_paths(each))]


def refuse(others: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise `ConfigError` for arguments `others` of `from_pretrained`, which has the `known` ones, naming ours."""
    hints = {name: _UPSTREAMS.get(name) or keyword_hint(name, known) for name in others}
    if faults := [f"from_pretrained: unknown argument {name!r}{hint}" for name, hint in hints.items()
                  if others[name] or name not in _UPSTREAMS]:  # fmt: skip
        raise ConfigError("\n".join(faults))


def keyword_hint(name: str, known: Collection[str]) -> str:
    """What `unknown` says of `name`, in which the flags are the keywords `known`, as Python writes them."""
    return re.sub(rf"--({'|'.join(known)})\b", r"\1", unknown(name, known, [f"--{each}" for each in known]))


def checked(kind: type[_Arguments], **values: Any) -> _Arguments:
    """The arguments of a call. Raises `ConfigError` naming those of a wrong type or range."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise ConfigError(explain_validation(error, "MetaModel", kind.model_fields)) from error


def precision_of(dtype: str | torch.dtype) -> str:
    """The name in `DTYPES` of a dtype, given as such a name or as torch's. Raises `ConfigError`."""
    spelled = str(dtype).removeprefix("torch.")
    name = next((name for name, kind in DTYPES.items() if spelled in (name, str(kind).removeprefix("torch."))), None)
    if name is None:
        raise ConfigError(f"dtype {dtype!r} is unknown.{nearest(spelled, DTYPES)} Known: {', '.join(DTYPES)}.")
    return name
