"""Reads Parquet and Arrow files by pyarrow, a few rows in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from accessory.data.readers.opening import content_of, is_packed, opened
from accessory.data.records import Record
from accessory.errors import DataError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_ROWS = 256  # decoded at a time


def read_parquet(path: Path, notes: list[str]) -> Iterator[Record]:
    """The rows of a Parquet file as records; their line is the number of the row. Raises `DataError`."""
    with named_faults(path, "a Parquet file"):
        yield from _rows(open_parquet(path).iter_batches(batch_size=_ROWS))


def open_parquet(path: Path) -> ParquetFile:
    """The file, of which nothing but its end has been read yet. Raises `DataError` without pyarrow."""
    pyarrow = _pyarrow(path)
    from pyarrow.parquet import ParquetFile

    return ParquetFile(_source(pyarrow, path))


def release_memory() -> None:
    """Give back what pyarrow has kept for files to come, which is tens of megabytes."""
    import pyarrow

    pyarrow.default_memory_pool().release_unused()


def read_arrow(path: Path, notes: list[str]) -> Iterator[Record]:
    """The rows of an Arrow file, as `datasets` writes them (a stream) or others do (a file). Raises `DataError`."""
    pyarrow = _pyarrow(path)
    with named_faults(path, "an Arrow file"):
        source = _source(pyarrow, path)
        if source.read(6) == b"ARROW1":
            table = pyarrow.ipc.open_file(source)
            batches = (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            source.seek(0)
            batches = pyarrow.ipc.open_stream(source)
        yield from _rows(part for batch in batches for part in _cut(batch))


def _cut(batch: Any) -> Iterator[Any]:
    return (batch.slice(start, _ROWS) for start in range(0, batch.num_rows, _ROWS))


def _rows(batches: Iterator[Any]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # what a damaged file says of its texts could lead out of memory that is its own
        for row in batch.to_pylist(maps_as_pydicts="strict"):
            number += 1
            yield Record(_without_nulls(row), number)


def _without_nulls(value: Any) -> Any:
    """The value without the keys whose value is null: a column has a place in each row, whether or not it is used."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _source(pyarrow: ModuleType, path: Path) -> Any:
    """The file, mapped into memory; what gzip packed has to be unpacked whole, since it is not read in order."""
    if not is_packed(path):
        return pyarrow.memory_map(str(path))
    with opened(path) as file:
        return pyarrow.BufferReader(file.read())


@contextmanager
def named_faults(path: Path, expected: str) -> Iterator[None]:
    """Words the errors of pyarrow as `DataError`s of the file, which was `expected` to be of its kind."""
    pyarrow = _pyarrow(path)
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: found {content_of(path)}; expected {expected} that is whole ({reason}).") from error


def _pyarrow(path: Path) -> ModuleType:
    try:
        import pyarrow.ipc
    except ImportError as error:
        raise DataError(
            f"{path}: Parquet and Arrow files are read by pyarrow, which is not installed here ({error}): "
            "pip install pyarrow."
        ) from error
    return pyarrow
