import gzip
import io
import json
import subprocess
import sys

import pytest

from accessory.data.readers import read_records
from accessory.data.readers.opening import data_suffix
from accessory.errors import DataError

RECORDS = [{"a": "é", "b": str(i)} for i in range(50)]
AS_TEXT = {
    "x.json": json.dumps(RECORDS, indent=1),
    "x.jsonl": "\n".join(map(json.dumps, RECORDS)),
    "x.csv": "a,b\n" + "".join(f"é,{i}\n" for i in range(50)),
    "x.tsv": "a\tb\n" + "".join(f"é\t{i}\n" for i in range(50)),
    "x.txt": "\n\n".join(map(json.dumps, RECORDS)),
}


@pytest.mark.parametrize("name", AS_TEXT)
def test_a_packed_file_is_read_as_what_it_packs(write, name):
    plain = list(read_records(write(name, AS_TEXT[name])))
    packed = write(f"{name}.GZ", gzip.compress(AS_TEXT[name].encode()))
    assert list(read_records(packed)) == plain and len(plain) == 50


@pytest.mark.parametrize("name", AS_TEXT)
def test_a_packed_file_cut_anywhere_is_refused(write, name):
    whole = gzip.compress(AS_TEXT[name].encode())
    for size in (1, 12, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        with pytest.raises(DataError, match=rf"{name}\.gz: (breaks off before the end|found .*; expected what gzip)"):
            list(read_records(write(f"{name}.gz", whole[:size])))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html>", r"x\.jsonl\.gz: found an HTML page of 15 bytes; expected what gzip packed whole"),
        (
            gzip.compress(b"{}", mtime=0)[:-5] + b"\0" * 5,
            r"x\.jsonl\.gz: found a gzip archive .*; expected what gzip packed whole",
        ),
        (
            gzip.compress(b"<html>", mtime=0),
            r"x\.jsonl\.gz:1: is not valid JSON .*found an HTML page \(packed by gzip\), expected",
        ),
    ],
)
def test_what_is_not_packed_or_packs_something_else_is_named(write, content, words):
    with pytest.raises(DataError, match=words):
        list(read_records(write("x.jsonl.gz", content)))


def test_packed_text_of_another_encoding_is_named(write):
    with pytest.raises(
        DataError, match=r"found UTF-16 text \(packed by gzip\), which is not UTF-8 \(byte 0\); save it as"
    ):
        list(read_records(write("x.csv.gz", gzip.compress("\ufeffa,b".encode("utf-16")))))


def test_the_suffix_under_gz_counts(tmp_path):
    assert data_suffix(tmp_path / "x.JSONL.gz") == ".jsonl" and data_suffix(tmp_path / "x.y.csv") == ".csv"
    assert data_suffix(tmp_path / "gz") == "" and data_suffix(tmp_path / "x.gz") == ""


READ = """
import resource, sys
from pathlib import Path
from accessory.data.readers import read_records
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert sum(1 for _ in read_records(Path(sys.argv[1]))) == int(sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_lines_are_unpacked_while_they_are_read(tmp_path):
    """200 MB of text, of which a few records are in memory."""
    record = json.dumps({"a": "x" * 100_000}).encode() + b"\n"
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        for _ in range(2000):
            file.write(record)
    (tmp_path / "x.jsonl.gz").write_bytes(packed.getvalue())
    words = [sys.executable, "-c", READ, str(tmp_path / "x.jsonl.gz"), "2000"]
    grown = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout) * 1024
    assert grown < 20_000_000
