"""What flags take beside texts and numbers: how a value may be written, and what it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

_UNITS = {"": 10**9, "GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
"""A number and its unit."""
_OPTIMIZERS_OF_TRAINER = (
    dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "adamw_hf"), "adamw")
    | dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit"), "adamw8bit")
    | {"paged_adamw_32bit": "paged_adamw"}
)
"""Name in transformers' Trainer -> ours."""
_LAYER_WORDS = ("none", "all", "auto")


def _layers(value: Any) -> Any:
    """`none`, `all`, `auto` or a number; a bool is the bare flag, as upstream's scripts give it."""
    if isinstance(value, bool):
        return "all" if value else "none"
    if value in _LAYER_WORDS or (isinstance(value, int) and value >= 0):
        return value
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    raise PydanticCustomError("layers", "Input should be 'none', 'all', 'auto' or a number of layers")


def _size(value: Any) -> Any:
    """A size in memory as it was written; a plain number is GB."""
    if value is None or isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(str(value))
    if not match or match[2].upper() not in _UNITS or not float(match[1]):
        raise PydanticCustomError(
            "size", "expected a size above 0 such as 24GB, 22GiB or 80000MB; a plain number is GB"
        )
    return str(value)


def size_bytes(size: str | None) -> int | None:
    """A size as `Size` leaves it, in bytes."""
    match = _SIZE.fullmatch(size or "")
    return int(float(match[1]) * _UNITS[match[2].upper()]) if match else None


def own_optimizer(value: Any) -> Any:
    """Our name of an optimizer that transformers' Trainer, and so qlora, calls otherwise."""
    if value == "paged_adamw_8bit":
        raise PydanticCustomError("optim", "moments in 8 bits are not paged here: give adamw8bit, or paged_adamw")
    return _OPTIMIZERS_OF_TRAINER.get(value, value) if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    """One path as a list of it."""
    return [value] if isinstance(value, str | Path) else value


def words(value: Any) -> Any:
    """Words apart, which may be separated by commas."""
    given = [value] if isinstance(value, str) else value
    return [word for text in given for word in text.split(",") if word] if isinstance(given, list) else given


Layers = Annotated[int | Literal[_LAYER_WORDS], BeforeValidator(_layers)]
Size = Annotated[str | None, BeforeValidator(_size)]
Paths = Annotated[list[Path], BeforeValidator(_listed)]
