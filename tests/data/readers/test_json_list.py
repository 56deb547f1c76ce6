"""A JSON list, or an object that holds one or is the one record; every record knows its line."""

import json
import random
import time

import pytest

from accessory.errors import DataError
from tests.data.readers.listed import RECORDS, read_records


@pytest.mark.parametrize("indent", [None, 0, 4])
def test_a_list_is_read_as_json_reads_it_and_every_line_is_right(write, indent):
    text = "\n\n" + json.dumps(RECORDS, indent=indent)
    found = read_records(write("x.json", text))
    assert [record.fields for record in found] == RECORDS
    lines = text.split("\n")
    for record in found:
        assert lines[record.line - 1].lstrip(" [").startswith("{")
    assert len({record.line for record in found}) == (1 if indent is None else len(RECORDS))


def test_a_file_cut_anywhere_is_never_read_as_whole(write):
    text = json.dumps(RECORDS, indent=1)
    for size in random.Random(0).sample(range(len(text)), 40):
        with pytest.raises(DataError):
            read_records(write("x.json", text[:size]))


def test_reading_is_linear(write):
    path = write("x.json", json.dumps([{"a": "word " * 20, "b": ""}] * 30_000, indent=1))
    start = time.process_time()
    assert read_records(path)[-1].line == 30_000 * 4 - 2
    assert time.process_time() - start < 5


@pytest.mark.parametrize("text", ['[{"a": 1}][{"a": 2}]', '[{"a": 1},]', '[,{"a": 1}]', '[{"a": 1},,{"a": 2}]'])
def test_what_is_no_json_list_is_refused(write, text):
    with pytest.raises(DataError):
        read_records(write("x.json", text))


def test_an_object_may_hold_the_list(write):
    text = json.dumps({"version": {"data": [{}]}, "tags": ["]"], "data": RECORDS, "n": 1}, indent=1)
    notes, lines = [], text.split("\n")
    found = read_records(write("x.json", text), notes)
    assert [record.fields for record in found] == RECORDS
    assert all(lines[record.line - 1].strip().startswith("{") for record in found)
    assert notes == ["the list 'data' is read; not used: 'version', 'tags', 'n'"]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_may_be_the_one_record(write, indent):
    """A conversation, too: its turns are no records."""
    for fields in ({"a": "b", "history": [["c"]]}, {"conversations": [{"from": "human", "value": "]"}]}):
        notes = []
        (found,) = read_records(write("x.json", "\n" + json.dumps(fields, indent=indent)), notes)
        assert (found.fields, found.line, found.fault, notes) == (fields, 2, None, ["read as one record"])


def test_a_record_is_known_by_its_number_where_others_stand_on_its_line(write):
    found = read_records(write("x.json", '[{"a": 1}, 2,\n{"a": 3}, {"a": 4},\n\n{"a": 5}]'))
    assert [(record.line, record.number) for record in found] == [(1, 1), (1, 2), (2, 3), (2, 4), (4, 0)]
    with pytest.raises(DataError, match=r"x\.json:1: is not valid JSON in record 3"):
        read_records(write("x.json", '[{"a": 1}, {"a": 2}, {"a" 3}]'))


def test_of_an_object_with_splits_the_one_called_train_is_read(write):
    notes = []
    found = read_records(write("x.json", '{"test": [{"a": 1}],\n"train": [{"a": 2}], "val": [{"a": 3}]}'), notes)
    assert [(record.fields["a"], record.line) for record in found] == [(2, 2)]
    assert notes == ["the list 'train' is read; not used: 'test', 'val'"]
    with pytest.raises(DataError, match=r"2 lists of objects in it \('train', 'more'\); .*: jq .train \S*x.json > NEW"):
        read_records(write("x.json", '{"train": [{"a": 2}], "more": [{"a": 3}]}'))
