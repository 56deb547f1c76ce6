import gzip

import pytest

from accessory.data.meta_config import load_data_config
from accessory.data.reading import identity_of, read_entries
from accessory.errors import DataError


def read(config):
    notes = []
    found = [(number, record.fields) for number, record in read_entries(load_data_config(config), notes)]
    return found, notes


def test_records_know_the_entry_that_they_are_from(write, tmp_path):
    for name, values in (("a.jsonl", [1, 2]), ("b.jsonl", []), ("c.jsonl", [3])):
        write(name, [{"a": value} for value in values])
    found, notes = read(write("c.yaml", "META:\n- path: '*.jsonl'\n- path: a.jsonl\n"))
    assert found == [(0, {"a": 1}), (0, {"a": 2}), (2, {"a": 3}), (3, {"a": 1}), (3, {"a": 2})]
    assert notes == [(1, "holds no records")]


def test_a_share_is_taken_of_all_files_of_an_item_together(write):
    for i in range(100):
        write(f"{i:03}.json", [{"a": i}])
    found, notes = read(write("c.yaml", "META: [{path: '0*.json', ratio: 0.25}]"))
    chosen = [fields["a"] for _, fields in found]
    assert len(chosen) == 25 and chosen == sorted(chosen) and (0, "25 of 100 records, as ratio 0.25 says") in notes
    write("whole.jsonl", [{"a": i} for i in range(100)])
    again, _ = read(write("d.yaml", "META: [{path: whole.jsonl, ratio: 0.25}]"))
    assert [fields["a"] for _, fields in again] == chosen


def test_columns_and_txt_of_the_entry_are_heeded(write):
    write("x.csv", "question,reply\nq,a\n")
    write("x.txt", "one\ntwo\n")
    config = "META:\n- {path: x.csv, columns: {instruction: question, output: reply}}\n- {path: x.txt, txt: lines}\n"
    assert read(write("c.yaml", config))[0] == [
        (0, {"instruction": "q", "output": "a"}), (1, {"text": "one"}), (1, {"text": "two"})
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"x\.csv: columns maps output to 'answer', which no record has"):
        read(write("c.yaml", "META: [{path: x.csv, columns: {output: answer}, ratio: 0.5}]"))


def test_an_identity_is_of_all_bytes_and_settings(write, tmp_path):
    write("x.json", "[{}]")

    def identity(**settings):
        (entry,) = load_data_config(write("c.yaml", {"META": [{"path": "x.json", **settings}]}))
        return identity_of(entry)

    plain = identity()
    assert plain == identity(type="mine", root="images") and "columns" not in plain and "txt" not in plain
    different = [identity(ratio=0.5), identity(columns={"output": "a"}), identity(txt="lines")]
    write("x.json", "[{ }]")
    different.append(identity())
    assert all(one != plain for one in different)
    write("x.json.gz", gzip.compress(b"[{}]"))
    assert identity_of(load_data_config(tmp_path / "x.json.gz")[0])["suffix"] == ".json.gz"


def test_an_identity_is_of_all_files_of_a_directory_in_their_order(write, tmp_path):
    """So that a run is not resumed on others."""
    (tmp_path / "d").mkdir()

    def identity():
        return [identity_of(entry) for entry in load_data_config(tmp_path / "d")]

    write("d/b.jsonl", [{"a": 1}])
    write("d/a.jsonl", [{"a": 2}])
    one, two = identity()
    write("d/b.jsonl", [{"a": 3}])
    assert identity()[0] == one and identity()[1]["content"] != two["content"]
    write("d/c.jsonl", [{"a": 1}])
    assert len(identity()) == 3 and identity()[2] == two
    (tmp_path / "d/a.jsonl").rename(tmp_path / "d/d.jsonl")
    assert identity()[2] == one
