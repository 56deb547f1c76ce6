import pytest

from accessory.data.finding import find_files
from accessory.data.meta_config import load_data_config
from accessory.data.reading import read_entries
from accessory.errors import DataError


@pytest.fixture
def lay(tmp_path):
    """Makes empty files, and their folders."""

    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("[]")

    return make


@pytest.fixture
def found(tmp_path):
    """The files that a name finds below the test's folder, as names, and the notes."""

    def look(given, data_dir="data"):
        files = find_files(given, [tmp_path], tmp_path / data_dir)
        return [str(path.relative_to(tmp_path)) for path in files.files], files.notes

    return look


def refused(found, given):
    with pytest.raises(DataError) as caught:
        found(given)
    return str(caught.value)


def test_a_directory_gives_its_data_files_sorted(lay, found):
    lay("d/b.json", "d/a/c.csv.gz", "d/a.JSONL", "d/README.md", "d/notes.txt", "d/.git/x.json", "d/_tmp/x.json")
    lay("d/dataset_infos.json", "d/cache-1.arrow", "d/b.json.gz")
    files, notes = found("d")
    assert files == ["d/a/c.csv.gz", "d/a.JSONL", "d/b.json"]
    assert notes[0].startswith("3 files of the directory ")
    assert notes[0].endswith("; not read: README.md, b.json.gz, dataset_infos.json, notes.txt")


def test_texts_are_read_where_nothing_else_is(lay, found):
    lay("d/b.txt", "d/a.txt", "d/README.md")
    assert found("d")[0] == ["d/a.txt", "d/b.txt"]


def test_what_is_held_out_is_not_trained_on(lay, found):
    lay("d/data/train-00000-of-00001.parquet", "d/data/test-00000-of-00001.parquet", "d/eval.jsonl", "d/more.jsonl")
    files, notes = found("d")
    assert files == ["d/data/train-00000-of-00001.parquet", "d/more.jsonl"]
    assert "not read: data/test-00000-of-00001.parquet, eval.jsonl" in notes[0]
    lay("e/test.jsonl", "e/latest.jsonl")
    assert found("e")[0] == ["e/latest.jsonl", "e/test.jsonl"]


def test_a_pattern_gives_the_data_files_that_match(lay, found, tmp_path):
    lay("d/p2.json", "d/p10.json", "d/p1.md", "d/deep/p3.csv", "d/q.json", "data/r1.json")
    assert found("d/p*") == (["d/p10.json", "d/p2.json"], ["2 files match; not read: p1.md"])
    assert found("d/**/p?.*")[0] == ["d/deep/p3.csv", "d/p2.json"]
    assert found("[d]")[0] == ["d/deep/p3.csv", "d/p10.json", "d/p2.json", "d/q.json"]
    assert found(f"{tmp_path}/d/q*")[0] == ["d/q.json"]
    assert found("r*")[0] == ["data/r1.json"]


def test_a_name_with_marks_of_a_pattern_is_a_file_where_there_is_one(lay, found):
    lay("d/a[1].json", "d/a1.json")
    assert found("d/a[1].json")[0] == ["d/a[1].json"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("empty", "is a directory without a data file (.json, .jsonl,"),
        ("only", "or .gz of these); found README.md, x.xlsx."),
        ("d/*.csv", "d/*.csv: no data file ("),
        ("d/*.csv", " matches; beside it: a.json, b.md."),
        ("d/b.md", "b.md is not a data file: found a JSON-like text of 2 bytes; expected one of .json, .jsonl,"),
        ("only/x.xlsx", "x.xlsx: .xlsx files are not read here; save the sheet as .csv in UTF-8"),
        ("d/a.jsn", "Did you mean 'a.json'?"),
        ("someone/something", "hf download someone/something --repo-type dataset --local-dir "),
        (
            "../data/alpaca_data.json",
            "It is a file of the data set alpaca; give that name to be told what",
        ),
        ("alpacca", "Did you mean 'alpaca'?"),
        ("nothing", "Known names: alpaca, alpaca-clean, "),
    ],
)
def test_what_finds_nothing_says_what_is_there(lay, found, tmp_path, given, words):
    lay("d/a.json", "d/b.md", "only/README.md", "only/x.xlsx")
    (tmp_path / "empty").mkdir()
    assert words in refused(found, given)


def test_a_directory_wins_over_a_name_and_the_data_directory_comes_last(lay, found):
    lay("alpaca/a.json", "data/alpaca_data.json", "data/mine/x.json", "mine/y.json", "data/z.json")
    assert found("alpaca")[0] == ["alpaca/a.json"]
    assert found("mine")[0] == ["mine/y.json"] and found("z.json")[0] == ["data/z.json"]


def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"instruction": f"{i}", "output": "é", "input": None} for i in range(7)]
    whole = datasets.Dataset.from_list(rows)
    whole.select([6, 1, 3, 0]).save_to_disk(tmp_path / "chosen")
    whole.save_to_disk(tmp_path / "whole", num_shards=3)
    parts = datasets.DatasetDict({"test": whole.select([0]), "train": whole.select(range(1, 7))})
    parts.save_to_disk(tmp_path / "parts")
    datasets.DatasetDict({"test": whole, "dev": whole}).save_to_disk(tmp_path / "untold")
    whole.to_parquet(tmp_path / "whole.parquet")


def test_what_datasets_saved_is_read(tmp_path, found):
    saved(tmp_path)

    def instructions(name):
        records = [record for _, record in read_entries(load_data_config(tmp_path / name), [])]
        assert all(record.fields["output"] == "é" and "input" not in record.fields for record in records)
        return "".join(record.fields["instruction"] for record in records)

    assert instructions("whole") == instructions("whole.parquet") == "0123456"
    assert instructions("chosen") == "6130" and instructions("parts") == "123456" and instructions("parts/test") == "0"
    assert len(found("whole")[0]) == 3 and "; not read: test" in found("parts")[1][0]
    assert "has the splits test, dev and no train; name one: " in refused(found, "untold")
    (tmp_path / "whole" / "data-00001-of-00003.arrow").unlink()
    assert "state.json names data-00001-of-00003.arrow, which is not there" in refused(found, "whole")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"_data_files": 3}', '{"_data_files": []}', '{"_data_files": [3]}'])
def test_a_description_that_is_none_is_named(write, found, tmp_path, text):
    (tmp_path / "d").mkdir()
    write("d/state.json", text)
    assert "state.json" in refused(found, "d")
