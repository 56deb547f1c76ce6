import gzip
import math
import random
import sys
from datetime import date

import pytest

from accessory.errors import DataError
from tests.data.readers.listed import read_records

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [
    {"instruction": "é", "input": None, "output": "a\n\u2028b", "n": 1, "messages": [{"role": "user", "content": "q"}]},
    {"instruction": "", "input": "more", "output": "c", "n": None, "messages": None},
    {
        "instruction": "d", "input": None, "output": "e", "n": 2,
        "messages": [{"role": "assistant", "content": None, "calls": [{"name": "f", "x": 0.5}]}],
    },
]  # fmt: skip
RECORDS = [
    {"instruction": "é", "output": "a\n\u2028b", "n": 1, "messages": [{"role": "user", "content": "q"}]},
    {"instruction": "", "input": "more", "output": "c"},
    {
        "instruction": "d",
        "output": "e",
        "n": 2,
        "messages": [{"role": "assistant", "calls": [{"name": "f", "x": 0.5}]}],
    },
]


def in_memory(write_table):
    sink = pyarrow.BufferOutputStream()
    write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


def write_arrow(make):
    def write_table(table, sink):
        with make(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)

    return write_table


FILES = {
    "x.parquet": in_memory(lambda table, sink: parquet.write_table(table, sink, row_group_size=2)),
    "x.arrow": in_memory(write_arrow(pyarrow.ipc.new_stream)),
    "y.arrow": in_memory(write_arrow(pyarrow.ipc.new_file)),
}


@pytest.mark.parametrize("name", FILES)
def test_rows_are_records_without_what_is_null(write, name):
    for packed, content in (("", FILES[name]), (".gz", gzip.compress(FILES[name]))):
        found = read_records(write(name + packed, content))
        assert [record.fields for record in found] == RECORDS and [record.line for record in found] == [1, 2, 3]


def test_rows_are_counted_over_all_that_is_decoded_at_a_time(write, tmp_path):
    table = pyarrow.table(
        {"a": [str(i) for i in range(1000)], "day": [date(2026, 1, 2)] * 1000, "x": [math.nan] * 1000}
    )
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=300)
    found = read_records(tmp_path / "x.parquet")
    assert [(record.line, record.fields["a"]) for record in found] == [(i + 1, str(i)) for i in range(1000)]
    assert found[0].fields["day"] == date(2026, 1, 2)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none_or_breaks_off_is_named(write, name):
    kind = "a Parquet file" if name.endswith("parquet") else "an Arrow file"
    for content, found in (
        (b"", "an empty file"),
        (b"<html>no such file</html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git-LFS pointer"),
        (FILES[name][: len(FILES[name]) // 2], "a "),
    ):
        with pytest.raises(DataError, match=rf"{name}: found {found}.*; expected {kind} that is whole \("):
            read_records(write(name, content))


def test_without_pyarrow_the_command_that_installs_it_is_said(write, monkeypatch):
    for module in ("pyarrow", "pyarrow.ipc"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"x\.parquet: .*not installed.*pip install pyarrow"):
        read_records(write("x.parquet", FILES["x.parquet"]))


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(write, name):
    chance, refused = random.Random(0), 0
    for _ in range(100):
        content = bytearray(FILES[name])
        content[chance.randrange(len(content))] = chance.randrange(256)
        try:
            read_records(write(name, bytes(content)))
        except DataError:
            refused += 1
    assert refused > 10
