"""Calibration text: rows of equally many tokens, cut out of the texts of a data file's records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.data.readers import read_records
from accessory.errors import DataError
from accessory.tokenizer import Tokenizer

SEPARATOR = "\n\n"
"""What stands between two records."""


def calibration_rows(path: Path, tokenizer: Tokenizer, length: int, count: int, seed: int = 0) -> Tensor:
    """Token ids int64 [count, length]: the records' texts one after the other, cut into rows, some of which are drawn.

    Each row begins with the tokens that begin every text of this tokenizer. The rows come from all over the file.
    Raises `DataError` for a file that cannot be read or has too little text.
    """
    start = list(tokenizer.start_ids)
    taken = length - len(start)
    if taken < 1:
        raise DataError(f"Rows of {length} tokens have no room for text; expected {len(start) + 1} or more.")
    ids: list[int] = []
    for text in _texts(path):
        ids += tokenizer.encode(text + SEPARATOR)
    found = len(ids) // taken
    if found < count:
        raise DataError(
            f"{path}: has {len(ids):,} tokens, {found} rows of {length}; expected text for {count} rows. Give more "
            "text, or smaller --rows or --row_tokens."
        )
    chosen = torch.randperm(found, generator=torch.Generator().manual_seed(seed))[:count]
    rows = torch.tensor(ids[: found * taken]).view(found, taken)[chosen]
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, -1), rows], 1)


def _texts(path: Path) -> Iterator[str]:
    """The text of each record: all its texts, a line each."""
    for record in read_records(path):
        if record.fault:
            raise DataError(f"{path}, line {record.line}: {record.fault}")
        if text := "\n".join(_strings(record.fields)):
            yield text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from [value] if value.strip() else []
    elif isinstance(value, dict):
        yield from (text for item in value.values() for text in _strings(item))
    elif isinstance(value, list):
        yield from (text for item in value for text in _strings(item))
