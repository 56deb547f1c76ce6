"""Documents that cannot be used are counted among all that were read, and named in little time."""

from __future__ import annotations

from pathlib import Path

import pytest

from accessory.data.raw import skipped
from accessory.data.raw.documents import Piece
from accessory.data.raw.skipped import Skipped, place_of
from accessory.errors import DataError
from tests.data.raw.texts import made, written


def test_documents_of_a_part_count_before_its_faults(tmp_path: Path, monkeypatch) -> None:
    file, told = written(tmp_path / "a.jsonl", made(1000)), []
    pieces = [Piece(None if n < 50 else "x", n, n + 1, fault="is bad") for n in range(1000)]
    places = []
    monkeypatch.setattr(skipped, "place_of", lambda file, at: places.append(at) or "here")
    counted = Skipped(0.1, told.append)
    counted.count(file, pieces)
    assert (counted.read, counted.faults, len(told)) == (1000, 50, 5)
    assert len(places) == 5  # the file is not searched for the lines of the others
    with pytest.raises(DataError, match=r"here: is bad\. 106 of 1,056 documents so far .* --max_skipped 0\.1 allows"):
        counted.count(file, [*pieces[:50], *pieces[:6]])


def test_lines_are_counted_near_the_start_of_a_file(tmp_path: Path, monkeypatch) -> None:
    file = written(tmp_path / "a.jsonl", ["x"] * 9)
    length = len(file.path.read_bytes()) // 9
    assert place_of(file, 4 * length) == f"{file.path}:5"
    monkeypatch.setattr(skipped, "_COUNTED", 3 * length)
    assert place_of(file, 3 * length) == f"{file.path}:4"
    assert place_of(file, 4 * length) == f"{file.path}: byte {4 * length:,}"
