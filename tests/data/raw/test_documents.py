"""Documents are the same in whatever blocks a file is read, and from the midst of a block."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from accessory.data.raw.documents import TextReader
from accessory.data.raw.files import RawFile
from accessory.errors import DataError
from tests.data.raw.texts import as_file, made, read, written

SIZES = (1, 300, 5000, 1 << 20)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_blocks_hold_every_document_once(name: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="reads Parquet")
    documents = made(120)
    file = written(tmp_path / name, documents, key="text")
    for size in SIZES:
        pieces = read(TextReader(), file, size)
        assert [piece.text for piece in pieces] == documents, size
        assert all(piece.begins and piece.ends for piece in pieces)
    assert TextReader().cut(file, 1)[:3] == [0, *(piece.after for piece in pieces[:2])]
    assert len(TextReader().cut(file, 1)) == 121 and len(TextReader().cut(file, 1 << 20)) < 5
    first, last = pieces[30].after, pieces[-1].after
    assert [piece.text for piece in TextReader().read(file, first, last)] == documents[31:]


@pytest.mark.parametrize(("unit", "expected"), [
    ("lines", ["one", "two", "three", "four", "five"]),
    ("paragraphs", ["one\ntwo", "three\r\nfour", "five"]),
])  # fmt: skip
def test_units_of_plain_text(unit: str, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\n\n \nthree\r\nfour\n\nfive")
    reader = TextReader(unit=unit)
    for size in (1, 8, 100):
        pieces = read(reader, as_file(path), size)
        assert [piece.text for piece in pieces] == expected, size
    for piece, after in zip(pieces, [*expected[1:], None], strict=True):
        rest = [*reader.read(as_file(path), piece.after, path.stat().st_size)]
        assert (rest[0].text if rest else None) == after


def test_a_whole_text_is_one_document_in_pieces(tmp_path: Path) -> None:
    """Cut at line ends, or between letters where there are none."""
    for text in ("\n".join(made(99)), "水" * 30_000):
        path = tmp_path / "a.txt"
        path.write_text(text)
        for size in (1000, 4001):
            pieces = read(TextReader(), as_file(path), size)
            assert "".join(piece.text for piece in pieces) == text and len(pieces) > 3
            assert [piece.begins for piece in pieces] == [True, *[False] * (len(pieces) - 1)]
            assert [piece.ends for piece in pieces] == [*[False] * (len(pieces) - 1), True]


def test_faults_of_documents_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"content": 3}\n{"contents": "x"}\n[1]\n{"content": "\xff"}\n{"content": "good"}\n{"content": ')
    pieces = read(TextReader(), as_file(path), 1 << 20)
    assert [piece.text for piece in pieces] == [None, None, None, None, "good", None]
    said = [piece.fault for piece in pieces]
    assert said[1] == "has no text under 'content' or 'text'; found 'contents' (--text_key)"
    assert said[2] == "is a list, not an object" and said[3].startswith("is not valid JSON (byte 13 is not UTF-8")
    assert [p.text for p in TextReader("contents").read(as_file(path), 0, 40)][1] == "x"
    path.write_bytes(b'{"text": "a\\ud800b"}\r\n{"text": "\\ud83d\\ude00\\u0000"}')
    half, whole = TextReader().read(as_file(path), 0, 99)
    assert half.text is None and half.fault == "holds half of a surrogate pair, which is no text"
    assert whole.text == "\U0001f600\0"
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read \(No such file"):
        TextReader().cut(RawFile(tmp_path / "gone.txt", "txt", 9), 1)


@pytest.mark.parametrize("blank", [b"\n", b"\r\n"])
def test_time_grows_as_the_file_does(blank: bytes, tmp_path: Path) -> None:
    """Neither where one kind of blank lines is never found, nor where a paragraph has many lines."""
    path, began = tmp_path / "a.txt", time.process_time()
    path.write_bytes((b"word\n" + blank) * 1_000_000)
    assert len(TextReader(unit="paragraphs").cut(as_file(path), 1 << 12)) > 1000
    path.write_bytes(b"word\n" * 300_000)
    (piece,) = TextReader(unit="paragraphs").read(as_file(path), 0, path.stat().st_size)
    assert len(piece.text) == 1_499_999
    assert time.process_time() - began < 3


def test_a_parquet_file_without_the_column(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="reads Parquet")
    file = written(tmp_path / "a.parquet", ["x"], key="body")
    with pytest.raises(DataError, match=r"a\.parquet: has no column content or text, only id, body\. --text_key"):
        TextReader().cut(file, 1000)
    with pytest.raises(DataError, match=r"no column bod, only id, body\. Did you mean 'body'\?"):
        TextReader("bod").cut(file, 1000)
    (tmp_path / "b.parquet").write_bytes(b"PAR1" + bytes(99))
    with pytest.raises(DataError, match=r"b\.parquet: found .*; expected a Parquet file that is whole"):
        TextReader().cut(as_file(tmp_path / "b.parquet"), 1000)
