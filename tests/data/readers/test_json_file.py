"""The forms of a JSON file, whatever it is named."""

import json

from tests.data.readers.listed import RECORDS, read_records


def test_json_lines_may_be_named_json_and_a_list_jsonl(write):
    notes = []
    lines = read_records(write("x.json", '\ufeff{"a": [{}]}\n\n{"a": \n{"a": 3}\n'), notes)
    assert [(record.line, record.fault is None) for record in lines] == [(1, True), (3, False), (4, True)]
    assert notes == ["read as JSON Lines, an object a line"]
    for indent in (None, 1):
        found = read_records(write("x.jsonl", json.dumps(RECORDS, indent=indent)))
        assert [record.fields for record in found] == RECORDS
