"""Decodes JSON as the standard has it, where Python would let something pass."""

from __future__ import annotations

import json
from typing import Any

from accessory.data.records import Record, kind


class StrictDecoder(json.JSONDecoder):
    """No NaN, and no key twice, of which Python would silently keep the last."""

    def __init__(self) -> None:
        super().__init__(parse_constant=self._constant, object_pairs_hook=self._pairs)
        self.fault: str | None = None

    def _constant(self, name: str) -> None:
        self.fault = f"holds {name}, which is not JSON"

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            names = [name for name, _ in pairs]
            self.fault = f"holds the key {next(n for n in names if names.count(n) > 1)!r} twice"
        return value

    def record(self, value: Any, line: int) -> Record:
        """The record of a value just decoded, with whatever fault was met on the way."""
        fault, self.fault = self.fault, None
        if not isinstance(value, dict):
            fault, value = f"is {kind(value)}, not an object", {}
        return Record(value, line, fault)


def is_json(text: bytes) -> bool:
    """Whether a text is one JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def reason(error: Exception) -> str:
    """Why a text could not be decoded, for a message."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return getattr(error, "msg", str(error))
