"""Tables of an entry's flags and of a method's settings in docs/, from their classes."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from accessory.config.command_line import required_first


def flags_table(config_class: type[BaseModel], beside: type[BaseModel] | None = None) -> str:
    """The Markdown table of an entry's flags, as docs/flags.md shows it; of those `beside` has alike, none."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    others = [] if beside is None else _rows(beside)
    return "\n".join(rows + [row for row in _rows(config_class) if row not in others])


def _rows(config_class: type[BaseModel]) -> list[str]:
    rows = []
    for name, field in required_first(config_class).items():
        default = "required" if field.is_required() else "" if field.default_factory else _shown(field.default)
        rows.append(f"| `--{name}` | {default} | {(field.description or '').replace('|', '/')} |")
    return rows


def settings_table(settings_class: type[BaseModel]) -> str:
    """The Markdown table of a method's keys of `--llama_config`."""
    rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for name, field in settings_class.model_fields.items():
        default = "" if field.default is None else f"`{json.dumps(field.default)}`"
        rows.append(f"| `{name}` | {default} | {_values(field.annotation)} | {' '.join(field.description.split())} |")
    return "\n".join(rows)


def _values(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in get_args(annotation))
    return "`true`, `false`" if annotation is bool else "number"


def _shown(default: Any) -> str:
    if default is False or default is None or default == []:
        return ""
    shown = ",".join(default) if isinstance(default, list) else default
    return "on" if default is True else f"`{shown}`"
