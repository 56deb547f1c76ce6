"""Gives the keys of records the names that shapes know, as `columns` of the data config says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from accessory.data.records import Record, shown_keys
from accessory.errors import DataError, nearest

_ABSENT = object()


def renamed(records: Iterator[Record], columns: dict[str, str], path: Path) -> Iterator[Record]:
    """The records with `columns` (name that shapes know -> key of the file) applied; a key of theirs may be `a.b.0`.

    A name that a record has already gives way to what is mapped to it. Raises `DataError` at the end of the records
    for a key that none of them has.
    """
    missing, keys = dict.fromkeys(columns.values()), {}
    for record in records:
        if record.fault is None:
            keys |= dict.fromkeys(record.fields) if missing else {}
            record = replace(record, fields=_mapped(record.fields, columns, missing))
        yield record
    if missing and keys:
        key = next(iter(missing))
        name = next(name for name, wanted in columns.items() if wanted == key)
        raise DataError(
            f"{path}: columns maps {name} to {key!r}, which no record has; their keys: {shown_keys(keys)}."
            f"{nearest(key, keys)}"
        )


def _mapped(fields: dict[str, Any], columns: dict[str, str], missing: dict[str, None]) -> dict[str, Any]:
    """The fields of one record under their new names; keys that it has are taken out of `missing`."""
    found = {name: _value(fields, key) for name, key in columns.items()}
    for name, value in found.items():
        if value is not _ABSENT:
            missing.pop(columns[name], None)
    moved = {key.partition(".")[0] if key not in fields else key for key in columns.values()}
    kept = {key: value for key, value in fields.items() if key not in moved}
    return kept | {name: value for name, value in found.items() if value is not _ABSENT}


def _value(fields: dict[str, Any], key: str) -> Any:
    """What a record has under a key, or along a path of keys and places of lists joined by dots; `_ABSENT` if none."""
    if key in fields:
        return fields[key]
    value: Any = fields if "." in key else _ABSENT
    for part in key.split(".") if "." in key else ():
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
    return value
