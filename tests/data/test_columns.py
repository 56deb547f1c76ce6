from pathlib import Path

import pytest

from accessory.data.columns import renamed
from accessory.data.records import Record
from accessory.errors import DataError


def mapped(fields, columns):
    records = [Record(one, number) for number, one in enumerate(fields, 1)]
    found = list(renamed(iter(records), columns, Path("x.json")))
    assert [record.line for record in found] == [record.line for record in records]
    return [record.fields for record in found]


def test_keys_get_the_names_that_shapes_know():
    columns = {"instruction": "question", "output": "answer"}
    assert mapped([{"question": "q", "answer": "a", "id": 1}, {"answer": "b"}], columns) == [
        {"instruction": "q", "output": "a", "id": 1}, {"output": "b"},
    ]  # fmt: skip


def test_what_is_mapped_wins_and_names_may_be_swapped():
    assert mapped([{"input": "q", "output": "a"}], {"output": "input", "input": "output"}) == [
        {"output": "q", "input": "a"}
    ]
    assert mapped([{"q": "q", "instruction": "sum up"}], {"instruction": "q", "output": "q"}) == [
        {"instruction": "q", "output": "q"}
    ]


def test_a_key_may_lead_inside():
    squad = {"question": "q", "answers": {"text": ["a", "b"], "answer_start": [3]}, "a.b": "dotted"}
    assert mapped([squad], {"output": "answers.text.0", "input": "a.b"}) == [
        {"question": "q", "output": "a", "input": "dotted"}
    ]
    for key in ("answers.text.2", "answers.text.x", "question.0", "none.0"):
        with pytest.raises(DataError, match="which no record has"):
            mapped([squad], {"output": key})


def test_a_key_that_no_record_has_is_named_with_the_nearest():
    words = r"^x\.json: columns maps output to 'answr', which no record has; their keys: 'question', 'answer'\. Did you"
    with pytest.raises(DataError, match=words):
        mapped([{"question": "q"}, {"answer": "a"}], {"instruction": "question", "output": "answr"})


def test_without_records_nothing_is_missing_and_faults_stay():
    assert mapped([], {"output": "a"}) == []
    broken = Record({}, 1, "is a list, not an object")
    assert list(renamed(iter([broken]), {"output": "a"}, Path("x.json"))) == [broken]
