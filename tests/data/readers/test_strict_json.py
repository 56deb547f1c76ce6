"""What Python lets pass and JSON does not."""

import pytest

from tests.data.readers.listed import read_records


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
