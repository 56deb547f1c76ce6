"""Reading takes little memory, however much there is to read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("reading_worker.py")


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_20_mb_are_read_in_less_than_100(tmp_path: Path, python) -> None:
    """By upstream's 64 rows of a process, of which each holds 1 MB at the most."""
    line = json.dumps({"content": "A sentence that is as long as another one. " * 100}) + "\n"
    names = ["a.jsonl", "b.jsonl", "validation.jsonl"]
    for name, count in zip(names, (2300, 2300, 1), strict=True):
        (tmp_path / name).write_text(line * count)
    (tmp_path / "meta.json").write_text(json.dumps(names))
    done = python(WORKER, tmp_path / "meta.json")
    assert done.returncode == 0, done.stderr
    tokens, grown = map(int, done.stdout.split())
    assert tokens > 19_000_000 and grown < 100e6
