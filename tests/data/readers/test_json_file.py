import json
import random
import time

import pytest

from accessory.data import readers
from accessory.errors import DataError


def read_records(path, notes=None):
    return list(readers.read_records(path, notes))


RECORDS = [{"a": "é\u2028 \n"}, {"a": {"b": [1, "]"]}}, {}, {"a": "last"}]


@pytest.mark.parametrize("indent", [None, 0, 4])
def test_a_list_is_read_as_json_reads_it_and_every_line_is_right(write, indent):
    text = "\n\n" + json.dumps(RECORDS, indent=indent)
    found = read_records(write("x.json", text))
    assert [record.fields for record in found] == RECORDS
    lines = text.split("\n")
    for record in found:
        assert lines[record.line - 1].lstrip(" [").startswith("{")
    assert len({record.line for record in found}) == (1 if indent is None else len(RECORDS))


def test_lines_are_numbered_with_the_blank_ones(write):
    found = read_records(write("x.jsonl", '\ufeff{"a": 1}\n\n  \n{"a": 2}\r\n{"a": 3}'))
    assert [(record.fields["a"], record.line) for record in found] == [(1, 1), (2, 4), (3, 5)]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"a": NaN}', "NaN"),
        ('{"a": [-Infinity]}', "-Infinity"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        ('{"a": {"c": 1, "c": 1}}', "'c' twice"),
        ("[1]", "list"),
        ('"text"', "a text"),
        ("null", "null"),
    ],
)
def test_what_python_lets_pass_is_a_fault_of_that_record_only(write, text, fault):
    good = '{"a": "NaN"}'
    for name, content in (("x.json", f"[{good},\n{text},\n{good}]"), ("x.jsonl", f"{good}\n{text}\n{good}")):
        before, bad, after = read_records(write(name, content))
        assert fault in bad.fault and bad.line == 2
        assert before.fault is None and after.fault is None


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


def test_a_line_separator_inside_a_string_ends_no_line(write):
    path = write("x.jsonl", json.dumps(RECORDS[0], ensure_ascii=False) + "\n")
    assert read_records(path)[0].fields == RECORDS[0]


@pytest.mark.parametrize("text", ['[{"a": 1}][{"a": 2}]', '[{"a": 1},]', '[,{"a": 1}]', '[{"a": 1},,{"a": 2}]'])
def test_what_is_no_json_list_is_refused(write, text):
    with pytest.raises(DataError):
        read_records(write("x.json", text))


def test_a_pointer_in_place_of_lines_is_named(write):
    with pytest.raises(DataError, match="Git-LFS"):
        read_records(write("x.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"))


def test_a_number_beyond_bounds_is_not_said_to_be_nested(write):
    with pytest.raises(DataError, match=r"x\.jsonl:1: is not valid JSON \(.*digits"):
        read_records(write("x.jsonl", '{"a": ' + "1" * 5000 + "}"))


def test_json_lines_may_be_named_json_and_a_list_jsonl(write):
    notes = []
    lines = read_records(write("x.json", '\ufeff{"a": [{}]}\n\n{"a": \n{"a": 3}\n'), notes)
    assert [(record.line, record.fault is None) for record in lines] == [(1, True), (3, False), (4, True)]
    assert notes == ["read as JSON Lines, an object a line"]
    for indent in (None, 1):
        found = read_records(write("x.jsonl", json.dumps(RECORDS, indent=indent)))
        assert [record.fields for record in found] == RECORDS


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
