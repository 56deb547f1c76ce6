"""Numbers of blocks as users write them: 3, "0-7", "0-7,20", or a list of these."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MOST = 1 << 12  # blocks; a range is spelled out


def _numbers(value: Any) -> Any:
    """Sorted numbers, or None as it is. Raises ValueError for what is none."""
    if value is None:
        return None
    found: set[int] = set()
    for item in value if isinstance(value, list) else [value]:
        parts = item.split(",") if isinstance(item, str) else [str(item)] if type(item) is int else [""]
        for part in parts:
            match = _RANGE.fullmatch(part.strip())
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if not first <= last < _MOST:
                raise ValueError(f"{item!r}: expected numbers of blocks from 0 on, or ranges of them such as '0-7,20'")
            found.update(range(first, last + 1))
    if not found:
        raise ValueError("names no block; leave it out for all")
    return sorted(found)


LayerNumbers = Annotated[list[int], BeforeValidator(_numbers)]
"""Of blocks, from 0 on, in order and each once."""
