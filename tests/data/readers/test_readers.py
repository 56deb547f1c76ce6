import pytest

from accessory.errors import DataError
from tests.data.readers.listed import read_records


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.json", '[{"a": 1},\n{"a": }]', r"x\.json:2: is not valid JSON"),
        ("x.json", '[{"a": 1},\n{"a": 1', r"x\.json:2: "),
        ("x.json", '[{"a": 1}\n', r"x\.json:1: expected ',' or '\]'"),
        ("x.json", '[{"a": 1}\n{"a": 2}]', r"x\.json:1: expected ','"),
        ("x.json", "{}", "found an empty object; expected a JSON list"),
        ("x.json", '{"a": [{}], "c": 1, "b": [{}]}', r"2 lists of objects in it \('a', 'b'\); expected a JSON list"),
        ("x.json", '{"a": [{}], "b": 1, "b": 2}', "holds the key 'b' twice"),
        ("x.json", '\n{"a": [{}],\n"b": }', r"x\.json:3: is not valid JSON.*expected a JSON list"),
        ("x.json", "", "an empty file"),
        ("x.json", "<!DOCTYPE html>", "an HTML page"),
        ("x.json", "version https://git-lfs.github.com/spec/v1", "Git-LFS"),
        ("x.jsonl", '{"a": ' + "[" * 100_000, r"x\.jsonl:1: .*nested too deeply"),
        ("x.json", b'[{"a": "\xff"}]', "is not UTF-8"),
        ("x.csv", 'a\tb\n"open', "separated by tabs"),
        ("x.csv", "a\tb,c\n1\t2\n", r"x\.csv:1: the header 'a.tb,c' holds tabs and commas; expected .*only one"),
        ("x.csv", "a b|c\n1\n", r"x\.csv:1: the header 'a b\|c' holds nothing that separates"),
        ("x.json", "\ufeffa".encode("utf-16"), "UTF-16 text of 6 bytes, which is not UTF-8 .byte 0.; save it as UTF-8"),
        (
            "x.csv",
            b"a\tb\nc\t\xe9\n",
            r"a text file of 8 bytes, .*\(byte 6\); .*: iconv -f WINDOWS-1252 -t UTF-8 .*x\.csv",
        ),
        ("x.csv", b"PK\x03\x04\xff", r"a zip archive of 5 bytes, which is not UTF-8 \(byte 4\); save it as UTF-8\.$"),
        ("x.csv", "sep=;\na,b\n", r"x\.csv:2: the columns are \['a,b'\]; .*semicolons"),
    ],
)
def test_a_broken_file_is_named_with_its_line(write, name, content, words):
    with pytest.raises(DataError, match=words):
        read_records(write(name, content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.json: cannot be read"):
        read_records(tmp_path / "absent.json")


@pytest.mark.parametrize("name", ["x.JSON", "x.Jsonl", "x.CSV", "x.TSV"])
def test_a_suffix_may_stand_in_capitals(write, name):
    text = {"x.JSON": '[{"a": "b"}]', "x.Jsonl": '{"a": "b"}'}.get(name, "a\tc\nb\td\n")
    assert read_records(write(name, text))[0].fields["a"] == "b"
