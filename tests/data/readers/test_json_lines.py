"""JSON Lines: numbered, and a line that is broken costs that line alone."""

import json

import pytest

from accessory.errors import DataError
from tests.data.readers.listed import RECORDS, read_records


def test_lines_are_numbered_with_the_blank_ones(write):
    found = read_records(write("x.jsonl", '\ufeff{"a": 1}\n\n  \n{"a": 2}\r\n{"a": 3}'))
    assert [(record.fields["a"], record.line) for record in found] == [(1, 1), (2, 4), (3, 5)]


def test_a_broken_line_is_a_fault_of_that_record_only(write):
    """Cut, nested too deeply, not UTF-8, with NUL: the lines around it can be used."""
    content = (
        b'\xef\xbb\xbf{"a": 1}\n{"a": \n{"a": "\xff"}\n'
        + b'{"a": '
        + b"[" * 100_000
        + b'\n{"a": "\x00"}\n{"b": 2}\n{"c'
    )
    found = read_records(write("x.jsonl", content))
    assert [record.line for record in found] == [1, 2, 3, 4, 5, 6, 7]
    assert [record.fault is None for record in found] == [True, False, False, False, False, True, False]
    assert "byte 7 is not UTF-8" in found[2].fault and "nested too deeply" in found[3].fault


def test_a_line_separator_inside_a_string_ends_no_line(write):
    path = write("x.jsonl", json.dumps(RECORDS[0], ensure_ascii=False) + "\n")
    assert read_records(path)[0].fields == RECORDS[0]


def test_a_pointer_in_place_of_lines_is_named(write):
    with pytest.raises(DataError, match="Git-LFS"):
        read_records(write("x.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"))


def test_a_number_beyond_bounds_is_not_said_to_be_nested(write):
    with pytest.raises(DataError, match=r"x\.jsonl:1: is not valid JSON \(.*digits"):
        read_records(write("x.jsonl", '{"a": ' + "1" * 5000 + "}"))
