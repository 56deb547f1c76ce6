"""The data configuration: a YAML with META entries, or simply a data file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from accessory.data.records import SUFFIXES
from accessory.data.templates import PROMPT_TYPES
from accessory.errors import DataError, explain_validation, nearest


class DataEntry(BaseModel):
    """One entry of META."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    path: Path
    """The data file; a relative one is looked for beside the YAML, then in the current directory."""
    type: str = "text"
    """A name for the group of data."""
    prompt_type: Literal[tuple(PROMPT_TYPES)] = "alpaca"
    """Template of the prompt."""
    preprocess: Literal["single_turn_llava"] | None = None
    """Turns records of another shape into instruction and output first."""
    ratio: float = Field(default=1.0, gt=0, le=1)
    """Share of the records to use, chosen by a fixed seed."""
    root: str | None = None
    """Directory of images; accepted because upstream's files hold it."""


def load_data_config(path: Path) -> list[DataEntry]:
    """The entries of a YAML, or one entry for a plain data file. Raises `DataError` listing all faults."""
    if path.suffix in SUFFIXES:
        return [DataEntry(path=path)]
    raw = _read_yaml(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("META"), list) or not raw["META"]:
        raise DataError(f"{path}: expected a list of data entries under the key META.")
    faults = [f"{path}: unknown key {key!r}.{nearest(str(key), ['META'])}" for key in raw if key != "META"]
    entries = []
    for number, item in enumerate(raw["META"]):
        where = f"{path}: META[{number}]"
        if isinstance(item, list) and len(item) == 2:  # the form before August 2023
            item = {"path": item[0], "type": item[1]}
        if not isinstance(item, dict):
            faults.append(f"{where}: is {item!r}; expected keys and values.")
            continue
        try:
            entry = DataEntry(**{str(key): value for key, value in item.items()})
        except ValidationError as error:
            faults.append(explain_validation(error, where, DataEntry.model_fields))
            continue
        found = _find(entry.path, path.parent)
        if found is None:
            faults.append(f"{where}: path {entry.path} is neither in {path.parent.resolve()} nor in {Path.cwd()}.")
        else:
            entries.append(entry.model_copy(update={"path": found}))
    if faults:
        raise DataError("\n".join(faults))
    return entries


def _find(path: Path, beside: Path) -> Path | None:
    return next((p for p in (beside / path, path) if p.is_file()), None)


def _read_yaml(path: Path) -> Any:
    try:
        return _StrictLoader(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path}: is not valid YAML ({' '.join(str(error).split())}).") from error


class _StrictLoader(yaml.SafeLoader):
    """Plain values only, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)
