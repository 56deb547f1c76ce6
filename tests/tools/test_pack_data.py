"""tools/pack_data.py: files of text become files of tokens, by several processes as by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from accessory.data.raw import packing
from accessory.data.raw.files import read_meta
from accessory.data.raw.packed_file import PackedFile
from accessory.tokenizer import open_tokenizer
from tests.data.raw.texts import made, written

TOOL = "tools/pack_data.py"


def test_files_become_tokens(tiny_base: Path, tmp_path: Path, called: Callable, monkeypatch) -> None:
    monkeypatch.setattr(packing, "BLOCK", 3000)  # so that several blocks are under way at once
    documents = {"a.jsonl": made(40, 0), "b.txt": ["\n".join(made(9, 1))], "validation.jsonl": made(5, 2)}
    paths = [written(tmp_path / name, texts).path for name, texts in documents.items()]
    done = called(TOOL, *paths, tmp_path / "out", "--tokenizer_path", tiny_base, "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == [f"{path.stem}.safetensors" for path in paths]
    files, last = read_meta(tmp_path / "out" / "meta.json", None, packed=True)
    tokenizer = open_tokenizer(tiny_base)
    for file, texts in zip([*files, last], documents.values(), strict=True):
        held = PackedFile.open(file, tokenizer)
        ends = np.flatnonzero(held.tokens == tokenizer.eos_id)
        assert held.documents == len(texts) == len(ends) and ends[-1] == len(held.tokens) - 1
        parts = np.split(held.tokens, ends[:-1] + 1)
        assert all(part[0] == tokenizer.bos_id for part in parts)
        assert [tokenizer.decode(part.tolist()) for part in parts] == texts
        assert load_file(file.path)["tokens"].dtype == np.uint16
    assert "3 files, the last of which is the validation file" in done.stdout
    (tmp_path / "more").mkdir()
    (tmp_path / "out" / "meta.json").rename(tmp_path / "more" / "meta.json")
    more = called(TOOL, paths[0], tmp_path / "more", "--tokenizer_path", tiny_base)
    assert more.returncode == 1 and "more/meta.json: there already; remove it" in more.stderr
    again = called(TOOL, *paths, tmp_path / "out", "--tokenizer_path", tiny_base)
    assert again.returncode == 1 and "a.safetensors, " in again.stderr and "there already; remove it" in again.stderr


@pytest.mark.parametrize(("arguments", "said"), [
    (["a.jsonl", "out"], "--tokenizer_path is needed"),
    (["a.jsonl", "sub/a.txt", "out", "--tokenizer_path", "BASE"], "a: 2 files have this name"),
    (["a.csv", "out", "--tokenizer_path", "BASE"], "a.csv: expected a file of .parquet, .jsonl, .ndjson, .txt"),
    (["a.jsonl", "out", "--tokenizer_path", "BASE", "--txt", "line"], "Did you mean 'lines'?"),
    (["a.jsonl", "out", "--tokenizer_path", "BASE", "--text_key", "body"], "has no text under 'body'; found 'n', 'con"),
    (["a.jsonl", "a.jsonl", "--tokenizer_path", "BASE"], "a.jsonl: is a file; expected the directory"),
], ids=range(6))  # fmt: skip
def test_refusals(
    arguments: list[str], said: str, tiny_base: Path, tmp_path: Path, called: Callable, monkeypatch
) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.jsonl", "sub/a.txt"):
        written(tmp_path / name, ["x"] * 60)
    (tmp_path / "BASE").symlink_to(tiny_base)
    monkeypatch.chdir(tmp_path)
    done = called(TOOL, *arguments, *([] if "--processes" in arguments else ["--processes", "1"]))
    assert done.returncode == 1 and said in done.stderr, done.stderr
    assert not [*tmp_path.glob("out/*")]
