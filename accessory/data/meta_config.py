"""The data configuration: a YAML with META entries, or simply a data file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from accessory.data.readers import SUFFIXES, is_data
from accessory.data.readers.text import UNITS
from accessory.data.shapes import OTHER_NAMES, SHAPES
from accessory.data.templates import PROMPT_LAYOUTS
from accessory.errors import DataError, explain_validation, is_there, nearest
from accessory.tokenizer.sniff import what_is

_REMEDIES = {
    ".xlsx": "save the sheet as .csv in UTF-8",
    **dict.fromkeys((".zip", ".bz2", ".xz", ".zst"), "unpack it first"),
}
_NAMES = f"{', '.join(SUFFIXES)}, or .gz of these"
_FILES = f"a data file ({_NAMES})"
_EXPECTED = f"{_FILES} or a YAML with the key META"


class DataEntry(BaseModel):
    """One entry of META."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    path: Path
    """The data file; a relative one is looked for beside the YAML, then in the current directory."""
    type: str = "text"
    """A name for the group of data; it has no effect."""
    shape: Literal[(*SHAPES, *OTHER_NAMES)] | None = None
    """What a record holds, of docs/data.md's table; absent: told from the keys of the records."""
    prompt_type: Literal[PROMPT_LAYOUTS] = "alpaca"
    """Layout of the prompt; `chat` is the checkpoint's own template. Absent: as the shape of the records has it."""
    mask_history: bool = False
    """Of a conversation, only the last answer is learned."""
    train_on_source: bool = False
    """Questions are learned, too, and not only answers."""
    preprocess: Literal["single_turn_llava"] | None = None
    """Turns records of another shape into instruction and output first."""
    ratio: float = Field(default=1.0, gt=0, le=1)
    """Share of the records to use, chosen by a fixed seed."""
    root: str | None = None
    """Directory of images; accepted because upstream's files hold it."""
    txt: Literal[UNITS] | None = None
    """What of a .txt file is one record: `paragraphs` (default), `lines`, or `whole`."""
    _group: int = PrivateAttr(default=0)

    @property
    def group(self) -> int:
        """Number of the item of the data config that this file is from; an item may name several files."""
        return self._group

    @field_validator("prompt_type", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any) -> Any:
        """Upstream spells the template without words `null`."""
        return "none" if value is None else value

    @field_validator("ratio", mode="before")
    @classmethod
    def _refuse_truth_values(cls, value: Any) -> Any:
        """Pydantic would take `true` for 1."""
        if isinstance(value, bool):
            raise ValueError("expected a number")
        return value


def load_data_config(path: Path) -> list[DataEntry]:
    """The entries of a YAML, or one entry for a plain data file. Raises `DataError` listing all faults."""
    if fault := _path_fault(path):
        raise DataError(fault)
    if is_data(path):
        if not path.is_file():
            raise DataError(f"{path}: found {what_is(path)}; expected {_EXPECTED}.")
        return [DataEntry(path=path)]
    raw = _read_yaml(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("META"), list) or not raw["META"]:
        found = f"the keys {', '.join(map(str, raw))}" if isinstance(raw, dict) else what_is(path)
        raise DataError(f"{path}: found {found}; expected a list of data entries under the key META, or {_FILES}.")
    faults = [f"{path}: unknown key {key!r}.{nearest(str(key), ['META'])}" for key in raw if key != "META"]
    entries = []
    for number, item in enumerate(raw["META"]):
        try:
            entries.append(_entry(item, f"{path}: META[{number}]", path.parent))
            entries[-1]._group = number
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))
    return entries


def _entry(item: Any, where: str, beside: Path) -> DataEntry:
    """One item of META, its path resolved. Raises `DataError`."""
    if isinstance(item, list) and len(item) == 2:  # the form before August 2023
        item = {"path": item[0], "type": item[1]}
    if not isinstance(item, dict):
        raise DataError(f"{where}: is {item!r}; expected keys and values.")
    try:
        entry = DataEntry(**{str(key): value for key, value in item.items()})
    except ValidationError as error:
        raise DataError(explain_validation(error, where, DataEntry.model_fields)) from error
    found = next((path for path in (beside / entry.path, entry.path) if is_there(path)), None)
    if fault := _path_fault(found or entry.path):
        raise DataError(f"{where}: {fault}")
    if not is_data(entry.path):
        raise DataError(f"{where}: path {entry.path} is not a data file; expected one of {_NAMES}.")
    if found is None:
        raise DataError(f"{where}: path {entry.path} is neither in {beside.resolve()} nor in {Path.cwd()}.")
    return entry.model_copy(update={"path": found})


def _path_fault(path: Path) -> str | None:
    """The error of a path that is a directory, or a file of a known kind that is not read here; None for others."""
    if is_there(path) and path.is_dir():
        return f"{path}: is a directory; expected a file. List several in a YAML, each as an entry of META."
    remedy = _REMEDIES.get(path.suffix.lower())
    return f"{path}: {path.suffix} files are not read here; {remedy}." if remedy else None


def _read_yaml(path: Path) -> Any:
    try:
        return _StrictLoader(path.read_text(encoding="utf-8-sig")).get_single_data()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: found {what_is(path)}; expected {_EXPECTED}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2023-02-30
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: is not valid YAML ({reason}); expected {_EXPECTED}.") from error


class _StrictLoader(yaml.SafeLoader):
    """Plain values only, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)
