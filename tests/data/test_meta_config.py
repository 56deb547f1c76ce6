import re
from pathlib import Path

import pytest

from accessory.data.meta_config import load_data_config
from accessory.errors import AccessoryError


def refused(path):
    with pytest.raises(AccessoryError) as caught:
        load_data_config(path)
    return str(caught.value)


@pytest.fixture
def data(write):
    return write("x.json", [])


def test_every_key_of_the_format(write, data):
    path = write(
        "c.yaml",
        "META:\n- path: x.json\n  type: image_text\n  prompt_type: qg\n  preprocess: single_turn_llava\n"
        "  ratio: 0.5\n  root: images\n- {path: x.json}\n",
    )
    full, short = load_data_config(path)
    expected = ("image_text", "qg", "single_turn_llava", 0.5, "images")
    assert (full.type, full.prompt_type, full.preprocess, full.ratio, full.root) == expected
    assert (short.type, short.prompt_type, short.preprocess, short.ratio) == ("text", "alpaca", None, 1.0)
    assert full.path == short.path == data


def test_the_form_of_lists(write, data):
    (entry,) = load_data_config(write("c.yaml", "META:\n- ['x.json', 'text']\n"))
    assert (entry.path, entry.type) == (data, "text")


def test_paths_are_sought_beside_the_yaml_then_here(write, data, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "here").mkdir()
    config = write("configs/c.yaml", "META:\n- path: ../x.json\n")
    monkeypatch.chdir(tmp_path / "here")
    assert load_data_config(config)[0].path.resolve() == data
    deep = write("configs/d.yaml", "META:\n- path: y.json\n")
    write("here/y.json", [])
    assert load_data_config(deep)[0].path.resolve() == tmp_path / "here/y.json"
    write("configs/y.json", [])
    assert load_data_config(deep)[0].path.resolve() == tmp_path / "configs/y.json"


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "JSON", "txt", "Parquet", "jsonl.gz"])
def test_a_data_file_is_a_config_of_one_entry(write, suffix):
    path = write(f"y.{suffix}", "")
    (entry,) = load_data_config(path)
    assert entry.path == path and entry.prompt_type == "alpaca"


def test_all_faults_are_told_at_once(write, data):
    message = refused(
        write(
            "c.yaml",
            "META:\n- {path: absent.json}\n- {path: x.json, promt_type: qg}\n- {path: x.json, ratio: 0}\n"
            "- {type: text}\n- {path: x.json, prompt_type: alpacca}\n- 7\nMETTA: []\n",
        )
    )
    for words in (
        "META[0]: path absent.json is neither",
        "META[1]: unknown key 'promt_type'. Did you mean 'prompt_type'?",
        "META[2]: 'ratio' is 0",
        "META[3]: 'path' is required",
        "META[4]: 'prompt_type' is 'alpacca'",
        "META[5]: is 7",
        "unknown key 'METTA'. Did you mean 'META'?",
    ):
        assert words in message
    assert str(data.parent) in message


@pytest.mark.parametrize("ratio", ["1.5", "-0.1", ".nan", "many", "true"])
def test_ratio_is_a_share(write, data, ratio):
    assert "'ratio'" in refused(write("c.yaml", f"META:\n- path: x.json\n  ratio: {ratio}\n"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("META:\n- path: x.json\n  path: y.json\n", "'path' stands twice"),
        ("META: []\nMETA: []\n", "'META' stands twice"),
        ("META: []\n", "expected a list of data entries"),
        ("- path: x.json\n", "expected a list of data entries"),
        ("", "expected a list of data entries"),
        ("META: [\n", "not valid YAML"),
        ("META:\n- path: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_what_is_no_data_config_is_refused(write, text, words):
    message = refused(write("c.yaml", text))
    assert words in message and "c.yaml" in message


def test_a_missing_yaml_is_named(tmp_path):
    assert "absent.yaml: cannot be read" in refused(tmp_path / "absent.yaml")


def test_a_null_prompt_type_is_upstreams_none(write, data):
    (entry,) = load_data_config(write("c.yaml", "META:\n- path: x.json\n  prompt_type: null\n"))
    assert entry.prompt_type in (None, "none")


def test_a_file_of_another_kind_is_told_with_the_other_faults(write, data):
    write("x.xlsx", "")
    write("x.conf", "a = b")
    message = refused(write("c.yaml", "META:\n- path: x.xlsx\n- path: absent.json\n- path: x.conf\n"))
    assert "META[0]: " in message and "x.xlsx: .xlsx files are not read here; save the sheet as .csv" in message
    assert "META[1]: path absent.json is neither" in message
    assert re.search(
        r"META\[2\]: path \S*x.conf is not a data file: found a text file .*; expected one of .json, .*or .gz", message
    )


def test_the_keys_found_are_named_where_meta_is_missing(write, data):
    assert "found the keys Meta; expected" in refused(write("c.yaml", "Meta:\n- path: x.json\n"))


def test_an_impossible_date_is_a_fault_of_the_yaml(write, data):
    assert "c.yaml: is not valid YAML" in refused(write("c.yaml", "META:\n- {path: x.json, type: 2023-02-30}\n"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.Xlsx", "PK", ".Xlsx files are not read here; save the sheet as .csv in UTF-8"),
        ("x.JSON.zip", "", ".zip files are not read here; unpack it first"),
        ("x.bin", b"PAR1\xff", "found a Parquet file of 5 bytes; expected a data file (.json, .jsonl, .ndjson, .csv"),
        ("x.data", "{", "is not valid YAML"),
    ],
)
def test_a_file_that_is_neither_data_nor_yaml_is_told_what_to_do(write, name, content, words):
    assert words in refused(write(name, content))


def test_a_name_too_long_for_a_path_is_none(write):
    assert "is neither in" in refused(write("c.yaml", f"META:\n- path: {'x' * 5000}.json\n"))
    assert "cannot be read" in refused(Path("x" * 5000 + ".yaml"))


def test_one_item_may_name_several_files(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("parts/b.jsonl", "parts/a.jsonl", "x.json", "data/z.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(name, [])
    config = write(
        "c.yaml", "META:\n- {path: [x.json, 'parts/*', x.json], ratio: 0.5}\n- path: parts\n- path: z.json\n"
    )
    entries = load_data_config([config, Path("x.json")])
    assert [(entry.path.name, entry.source.number) for entry in entries] == [
        ("x.json", 0), ("a.jsonl", 0), ("b.jsonl", 0), ("a.jsonl", 1), ("b.jsonl", 1), ("z.json", 2), ("x.json", 3)
    ]  # fmt: skip
    assert [entry.ratio for entry in entries] == [0.5] * 3 + [1.0] * 4
    assert entries[0].source.name == entries[2].source.name == "x.json, parts/*, x.json"
    notes = entries[0].source.notes
    assert notes[0] == "2 files match" and "x.json is named twice and read once" in notes[1]
    assert entries[1].source.notes == () and "2 files of the directory" in entries[3].source.notes[0]


def test_a_setting_for_texts_is_told_where_there_is_none(write, data):
    (entry,) = load_data_config(write("c.yaml", "META:\n- {path: x.json, txt: lines}\n"))
    assert entry.source.notes == ("txt is not used: there is no .txt",)


def test_faults_of_several_configs_are_told_at_once(write, tmp_path):
    write("c.yaml", "META:\n- path: absent.json\n")
    message = refused([tmp_path / "c.yaml", tmp_path / "none.json", tmp_path / "d.yaml"])
    assert "META[0]: path absent.json is neither" in message and "none.json is not there" in message
    assert "d.yaml: cannot be read" in message


def test_the_nearest_file_is_named(write, data):
    assert "Did you mean 'x.json'?" in refused(write("c.yaml", "META:\n- path: x.jsn\n"))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("{instuction: q}", "'instuction' is no name that is read. Did you mean 'instruction'? Known: instruction, "),
        ("{output: [a]}", "'columns.output' is ['a']"),
        ("question", "'columns' is 'question'"),
    ],
)
def test_columns_name_what_is_known(write, data, columns, words):
    assert words in refused(write("c.yaml", f"META:\n- {{path: x.json, columns: {columns}}}\n"))


def test_a_path_is_a_text_or_a_list_of_texts(write, data):
    for path in ("[]", "[x.json, 3]", "{a: b}", "null", '""', "[x.json, '']"):
        assert "META[0]: 'path" in refused(write("c.yaml", f"META:\n- {{path: {path}}}\n")), path


def test_a_yaml_may_open_with_a_byte_order_mark(write, data):
    assert load_data_config(write("c.yaml", "\ufeffMETA:\n- path: x.json\n"))[0].path == data


def test_the_checkpoints_own_template_is_a_prompt_type(write, data):
    (entry,) = load_data_config(write("c.yaml", "META:\n- path: x.json\n  prompt_type: chat\n"))
    assert entry.prompt_type == "chat"
