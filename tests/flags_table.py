"""The table of an entry's flags in docs/flags.md, from its configuration."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def flags_table(config_class: type[BaseModel]) -> str:
    """The Markdown table of an entry's flags, as docs/flags.md shows it."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for name, field in config_class.model_fields.items():
        default = "required" if field.is_required() else "" if field.default_factory else _shown(field.default)
        rows.append(f"| `--{name}` | {default} | {(field.description or '').replace('|', '/')} |")
    return "\n".join(rows)


def _shown(default: Any) -> str:
    if default is False or default is None or default == []:
        return ""
    return "on" if default is True else f"`{default}`"
