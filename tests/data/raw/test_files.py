"""Lists of files are checked entry by entry, and what lies in them identifies them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accessory.data.raw.files import identity_of, read_meta, trained_on_too
from accessory.errors import DataError
from tests.data.raw.texts import as_file, written


@pytest.mark.parametrize(("names", "packed", "said"), [
    (["a.pkl", "b.jsonl"], True, r"entry 1, 'a\.pkl': a pickle could run any code .* python tools/pack_data\.py"),
    (["a.jsonl.gz", "b.jsonl"], False, r"entry 1, .*: packed by gzip, .* gzip -d"),
    (["b.jsonl", "b.jsonl"], True, r"entry 1, .*--packed_data expects files of tokens .* leave out --packed_data"),
    (["x.safetensors"], False, "entry 1, .*: holds tokens; give --packed_data"),
    (["b.jsonl", "c.json"], False, r"entry 2, 'c\.json': expected one of \.parquet, \.jsonl"),
    (["d.jsonl", "b.jsonl"], False, r"there is no file .*d\.jsonl\. Did you mean 'b\.jsonl'\?"),
    (["b.jsonl"], False, "lists 1 file; expected two or more: the last one is evaluated on"),
    ({"a": 1}, False, r'found \{"a": 1\}; expected a JSON list of file names'),
    ([], False, "expected a JSON list of file names"),
], ids=range(9))  # fmt: skip
def test_faults_are_named(names: object, packed: bool, said: str, tmp_path: Path) -> None:
    written(tmp_path / "b.jsonl", ["x"])
    (tmp_path / "meta.json").write_text(json.dumps(names))
    with pytest.raises(DataError, match=said):
        read_meta(tmp_path / "meta.json", None, packed)


def test_names_are_relative_to_the_root(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        written(tmp_path / "data" / f"{name}.jsonl", [name])
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps(["a.jsonl", str(tmp_path / "data" / "b.jsonl")]))
    (first,), last = read_meta(meta, tmp_path / "data", False)
    assert (first.path.name, last.path.name) == ("a.jsonl", "b.jsonl")
    with pytest.raises(DataError, match=r"there is no file .*/a\.jsonl"):
        read_meta(meta, None, False)


def test_a_change_changes_the_identity(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", ["x" * 9000, "y" * 90_000])
    before, data = identity_of([file]), file.path.read_bytes()
    for place in (20, 99_000):
        file.path.write_bytes(data[:place] + b"z" + data[place + 1 :])
        assert identity_of([as_file(file.path)]) != before
    file.path.write_bytes(data)
    assert identity_of([as_file(file.path)]) == before != identity_of([file, file])


def test_a_validation_file_that_is_trained_on_is_told(tmp_path: Path) -> None:
    one, other = written(tmp_path / "a.jsonl", ["x"]), written(tmp_path / "b.jsonl", ["x"])
    assert trained_on_too([one], other) == []
    again = as_file(tmp_path / "." / ".." / tmp_path.name / "a.jsonl")
    (said,) = trained_on_too([one, other], again)
    assert "a.jsonl is trained on, too" in said
