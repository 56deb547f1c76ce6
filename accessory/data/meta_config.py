"""The data configuration: a YAML with META entries, or simply a data file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from accessory.data.finding import DATA_DIR, NAMES, find_files, path_fault
from accessory.data.readers import is_data
from accessory.data.readers.opening import data_suffix
from accessory.data.readers.text import UNITS
from accessory.data.shapes import OTHER_NAMES, SHAPES
from accessory.data.templates import PROMPT_LAYOUTS
from accessory.errors import DataError, explain_validation, is_file, is_there, nearest
from accessory.tokenizer.sniff import what_is

_FILES = f"a data file ({NAMES})"
_EXPECTED = f"{_FILES} or a YAML with the key META"
_READ = (*dict.fromkeys(key for shape in SHAPES.values() for key in shape.reads), "image")
"""Keys that are read of some record."""


@dataclass(frozen=True)
class Source:
    """An item of the data config, which may name several files.

    number: its place among all items. name: its path as the user wrote it. notes: how its files were found, with the
    first of them only.
    """

    number: int
    name: str
    notes: tuple[str, ...] = ()


class DataEntry(BaseModel):
    """One file of the data config, with the settings that the entry of META gives it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    path: Path
    """A data file, a directory of them, a pattern such as `part-*.jsonl`, a known name such as `alpaca`, or a list of
    these; looked for beside the YAML, in the current directory, then in --data_dir."""
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
    preprocess: Literal["single_turn_llava", "caption"] | None = None
    """Turns records into others first: each question of a conversation and its answer, or an image (under `url` or
    `image`) and its `caption`."""
    ratio: float = Field(default=1.0, gt=0, le=1)
    """Share of the records to use, chosen by a fixed seed."""
    root: str | None = None
    """The directory that paths of images are relative to, and that none may leave; looked for as `path` is. Absent: the
    data file's."""
    txt: Literal[UNITS] | None = None
    """What of a .txt file is one record: `paragraphs` (default), `lines`, or `whole`."""
    columns: dict[str, str] | None = None
    """Name that a shape of records knows -> what this data calls it: `{instruction: question, output: answer}`."""
    _source: Source = PrivateAttr(default_factory=lambda: Source(0, ""))
    _root: Path | None = PrivateAttr(default=None)

    @property
    def source(self) -> Source:
        """What named this file in the data config."""
        return self._source

    @property
    def image_root(self) -> Path:
        """The directory of its images. Raises `DataError` where `root` is none."""
        if self.root is None:
            return self.path.parent
        if self._root is None:
            looked = "beside the YAML, in the current directory and in --data_dir"
            raise DataError(f"root {self.root!r} of {self.path} is no directory, looked for {looked}.")
        return self._root

    @field_validator("prompt_type", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any) -> Any:
        """Upstream spells the template without words `null`."""
        return "none" if value is None else value

    @field_validator("path", mode="before")
    @classmethod
    def _refuse_nothing(cls, value: Any) -> Any:
        """An empty path would be the current directory."""
        if value == "":
            raise ValueError("expected the path of a file or directory, or a name")
        return value

    @field_validator("ratio", mode="before")
    @classmethod
    def _refuse_truth_values(cls, value: Any) -> Any:
        """Pydantic would take `true` for 1."""
        if isinstance(value, bool):
            raise ValueError("expected a number")
        return value

    @field_validator("columns")
    @classmethod
    def _check_names(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for name in value or ():
            if name not in _READ:
                raise ValueError(f"{name!r} is no name that is read.{nearest(name, _READ)} Known: {', '.join(_READ)}")
        return value


def load_data_config(given: Path | Sequence[Path], data_dir: Path = DATA_DIR) -> list[DataEntry]:
    """One entry for each file that `--data_config` names, directly or in a YAML, in order.

    given: one or several of: a YAML, or what `path` in a YAML may be. data_dir: where what is found nowhere else, and
    data sets of known names, are looked for. Raises `DataError` listing all faults.
    """
    groups: list[list[DataEntry]] = []
    faults = []
    for word in [given] if isinstance(given, Path | str) else given:
        try:
            groups += _groups(Path(word), data_dir)
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))
    for number, group in enumerate(groups):
        for entry in group:
            entry._source = replace(entry.source, number=number)
    return [entry for group in groups for entry in group]


def _groups(path: Path, data_dir: Path) -> list[list[DataEntry]]:
    """The entries of each item of a YAML, or those of a path that is none."""
    if not _is_yaml(path):
        return [_entries({"path": str(path)}, "", [Path()], data_dir)]
    raw = _read_yaml(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("META"), list) or not raw["META"]:
        found = f"the keys {', '.join(map(str, raw))}" if isinstance(raw, dict) else what_is(path)
        raise DataError(f"{path}: found {found}; expected a list of data entries under the key META, or {_FILES}.")
    faults = [f"{path}: unknown key {key!r}.{nearest(str(key), ['META'])}" for key in raw if key != "META"]
    groups = []
    for number, item in enumerate(raw["META"]):
        try:
            groups.append(_entries(item, f"{path}: META[{number}]: ", [path.parent, Path()], data_dir))
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))
    return groups


def _is_yaml(path: Path) -> bool:
    """Whether a path is to be read as YAML: it says so, or is a file whose name says nothing."""
    if path.suffix.lower() in (".yaml", ".yml"):
        return True
    return is_file(path) and not is_data(path) and path_fault(path) is None


def _entries(item: Any, where: str, folders: list[Path], data_dir: Path) -> list[DataEntry]:
    """The entries of one item of META, one for each of its files. Raises `DataError`."""
    if isinstance(item, list) and len(item) == 2 and not isinstance(item[1], list):  # the form before August 2023
        item = {"path": item[0], "type": item[1]}
    if not isinstance(item, dict):
        raise DataError(f"{where}is {item!r}; expected keys and values.")
    settings = {str(key): value for key, value in item.items()}
    paths = settings.get("path")
    names = paths if isinstance(paths, list) and paths else [paths]
    try:
        models = [DataEntry(**settings | ({"path": name} if "path" in settings else {})) for name in names]
    except ValidationError as error:
        raise DataError(explain_validation(error, where.rstrip(": "), DataEntry.model_fields)) from error
    files: dict[Path, None] = {}
    notes: list[str] = []
    for model in models:
        try:
            found = find_files(str(model.path), folders, data_dir)
        except DataError as error:
            raise DataError(f"{where}{error}") from error
        notes += found.notes + [f"{path} is named twice and read once" for path in found.files if path in files]
        files |= dict.fromkeys(found.files)
    if models[0].txt and not any(data_suffix(path) == ".txt" for path in files):
        notes.append("txt is not used: there is no .txt")
    name = ", ".join(map(str, names))
    roots = [folder / models[0].root for folder in (*folders, data_dir)] if models[0].root else []
    root = next((path for path in roots if is_there(path) and path.is_dir()), None)
    sources = [Source(0, name, () if place else tuple(notes)) for place in range(len(files))]
    return [_entry(models[0], path, source, root) for path, source in zip(files, sources, strict=True)]


def _entry(model: DataEntry, path: Path, source: Source, root: Path | None) -> DataEntry:
    entry = model.model_copy(update={"path": path})
    entry._source, entry._root = source, root
    return entry


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
        """A mapping as Python has it. Raises yaml's `ConstructorError` for a key that stands twice."""
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)
