import csv
import io

import pytest

from accessory.errors import DataError
from tests.data.readers.listed import read_records


def test_a_table_is_separated_by_tabs(write):
    found = read_records(write("x.csv", 'instruction\toutput\na, b\t"c\td"\nonly one\n'))
    assert found[0].fields == {"instruction": "a, b", "output": "c\td"} and found[0].line == 2
    assert "columns" in found[1].fault


def test_a_line_separator_inside_a_cell_ends_no_row(write):
    assert read_records(write("x.csv", "a\tb\nc\u2028d\te\n"))[0].fields == {"a": "c\u2028d", "b": "e"}


def test_a_row_of_several_lines_starts_at_its_first(write):
    assert [record.line for record in read_records(write("x.csv", 'a\tb\n"c\nd"\te\nf\tg\n'))] == [2, 4]


@pytest.mark.parametrize(("name", "header"), [("x.tsv", "instruction,output"), ("x.csv", "a\ta\tb"), ("x.tsv", "")])
def test_a_header_must_have_columns_and_none_twice(write, name, header):
    with pytest.raises(DataError, match=r":1: the columns are .*separated by tabs"):
        read_records(write(name, f"{header}\n1\t2\t3\n"))


ROWS = [{"instruction": 'a,\tb;"c', "output": "two\nlines"}, {"instruction": "", "output": "é;,\t"}]


@pytest.mark.parametrize(("separator", "named"), [("\t", "tabs"), (",", "commas"), (";", "semicolons")])
def test_a_table_is_read_as_it_was_written_whatever_separates_it(write, separator, named):
    text = io.StringIO()
    table = csv.DictWriter(text, ["instruction", "output"], delimiter=separator)
    table.writeheader()
    table.writerows(ROWS)
    notes = []
    found = read_records(write("x.csv", "\ufeff" + text.getvalue()), notes)
    assert [record.fields for record in found] == ROWS and notes == [f"columns separated by {named}"]


def test_excel_may_name_the_separator_above_the_header(write):
    for name, end in (("x.csv", "\r\n"), ("x.tsv", "\n")):
        found = read_records(write(name, end.join(("\ufeffsep=;", "a,b;c", "1,2;3"))))
        assert [(record.fields, record.line) for record in found] == [({"a,b": "1,2", "c": "3"}, 3)]


def test_a_cell_may_be_as_long_as_it_likes(write):
    for name in ("x.csv", "x.tsv"):
        assert read_records(write(name, f"a\tb\n1\t{'x' * 300_000}\n"))[0].fields["b"] == "x" * 300_000


def test_blank_rows_of_a_table_count_as_lines(write):
    found = read_records(write("x.csv", "a\tb\n\n1\t2\n3\n"))
    assert [(record.line, record.fault is None) for record in found] == [(3, True), (4, False)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('a,b\n1,"open\n2,3\n', r"x\.csv:3: is not a table separated by commas \(.*; a cell that holds a quote stands"),
        ("a,b\n1\x00,2\n3,\xff\n".encode("latin-1"), r"x\.csv: found .*which is not UTF-8 \(byte 11\)"),
    ],
)
def test_a_table_that_breaks_off_within_is_refused_with_its_place(write, content, words):
    with pytest.raises(DataError, match=words):
        read_records(write("x.csv", content))


def test_rows_of_another_width_are_faults_of_their_own(write):
    found = read_records(write("x.csv", "sep=,\na,b\n1,2,3\n4\n5,6\n"))
    assert [record.line for record in found] == [3, 4, 5] and found[2].fault is None
    assert found[0].fault == "has 3 columns, the header has 2: cells that hold commas or line breaks stand in quotes"
    assert found[1].fault.startswith("has 1 columns, the header has 2")


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
def test_a_table_may_have_one_column(write, name):
    found = read_records(write(name, '"text"\n"one, two"\nthree\n'))
    assert [record.fields for record in found] == [{"text": "one, two"}, {"text": "three"}]
