import pytest

from accessory.data.readers import read_records

TEXT = "\ufeff\n\nOne,\r\ntwo.\r\n \t\nThree.\n\n\n Four\u2028five.\n"


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        (None, [(3, "One,\ntwo."), (6, "Three."), (9, " Four\u2028five.")]),
        ("paragraphs", [(3, "One,\ntwo."), (6, "Three."), (9, " Four\u2028five.")]),
        ("lines", [(3, "One,"), (4, "two."), (6, "Three."), (9, " Four\u2028five.")]),
        ("whole", [(3, "One,\ntwo.\n \t\nThree.\n\n\n Four\u2028five.")]),
    ],
)
def test_what_is_one_record_of_a_text_is_a_setting(write, unit, expected):
    notes = []
    found = list(read_records(write("x.txt", TEXT), notes, unit))
    assert [(record.line, record.fields["text"]) for record in found] == expected
    assert ("the default" in notes[0]) == (unit is None) and len(notes) == 1


@pytest.mark.parametrize("unit", ["paragraphs", "lines", "whole"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_blank_text_has_no_records(write, unit, text):
    assert not list(read_records(write("x.txt", text), None, unit))
