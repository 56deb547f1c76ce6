"""Data, settings, weights and tokenizers as they must not be. Numbers: docs/reliability.md.

Each has tests of its own beside its reader; here a whole run meets them.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from accessory.config import FinetuneConfig, parse
from accessory.data.batch import IGNORE
from accessory.data.corpus import Corpus, build_corpus
from accessory.errors import AccessoryError, CheckpointError, ConfigError, DataError, TokenizerError
from accessory.finetuning import finetune
from accessory.tokenizer import open_tokenizer, trial
from tests.conftest import small_sentencepiece
from tests.faults.job import ROOT, SIZE, Job, said, settings

GOOD = '{"instruction": "say a", "output": "a"}'
BAD_LINES = {
    "invalid JSON": (b'{"instruction": "a", "output": }', "is not valid JSON"),
    "cut off": (b'{"instruction": "a", "outp', "is not valid JSON"),
    "no UTF-8": (b'{"instruction": "\xff\xfe", "output": "a"}', "is not UTF-8"),
    "wrong kind": (b'{"instruction": 3, "output": "a"}', "'instruction' is a number, expected text"),
    "list": (b'["a", "b"]', "is a list, not an object"),
    "missing key": (
        b'{"instruction": "a", "outputs": "b"}',
        "has no key 'output', only 'instruction', 'outputs'; did it mean 'outputs'",
    ),
    "empty answer": (b'{"instruction": "a", "output": "  "}', "'output' is empty"),
    "duplicate key": (b'{"instruction": "a", "output": "b", "output": "c"}', "holds the key 'output' twice"),
    "NaN": (b'{"instruction": "a", "output": NaN}', "holds NaN, which is not JSON"),
    "nested 100k": (b'{"instruction": ' + b"[" * 100_000 + b"]" * 100_000 + b', "output": "a"}', "nested too deeply"),
    "no answer left": (
        b'{"instruction": "' + b"word " * 2000 + b'", "output": "a"}',
        "its prompt fills all 160 tokens",
    ),
    "half a surrogate": (b'{"instruction": "a", "output": "\\ud800"}', "surrogate"),
}


@pytest.fixture
def bad_lines(tmp_path: Path) -> Path:
    """A good line before and after each bad one, a mark at the file's start, NUL in a text."""
    lines = [GOOD.encode()]
    for bad, _ in BAD_LINES.values():
        lines += [bad, GOOD.encode()]
    lines += [b'{"instruction": "NUL \x00", "output": "\\u0000 a"}'.replace(b"\x00", b"\\u0000")]
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    return path


def build(data: Path, base: Path, **more: object) -> Corpus:
    """As a run does."""
    return build_corpus(data, open_tokenizer(base), max_words=160, **more)


@pytest.mark.slow
def test_24_bad_records_are_skipped_and_named(bad_lines: Path, tiny_base: Path) -> None:
    """One cause, one line with file and line number; what is left has something to learn in every document."""
    with bad_lines.open("ab") as file:
        file.write(b'\n{"instruction": "10 MB", "output": "' + b"word " * 2_000_000 + b'"}')
    corpus = build(bad_lines, tiny_base)
    assert len(corpus) == len(BAD_LINES) + 3
    for number, (_, cause) in enumerate(BAD_LINES.values()):
        (line,) = [line for line in corpus.omissions.lines() if f"lines.jsonl:{2 * number + 2})" in line]
        assert line.startswith("skipped 1: ") and cause in line
    assert corpus.omissions.truncated == 1
    for i in range(len(corpus)):
        tokens, labels = corpus.document(i)
        assert len(tokens) <= 160 and (labels != IGNORE).any()
    assert corpus.where(1) == f"1 ({bad_lines}:3)"


def test_24_or_refused(bad_lines: Path, tiny_base: Path) -> None:
    """All of them at once."""
    with pytest.raises(
        DataError, match=r"^12 of 26 records cannot be used, more than --max_skipped 0 allows:"
    ) as caught:
        build(bad_lines, tiny_base, max_skipped=0.0)
    assert all(cause in str(caught.value) for _, cause in BAD_LINES.values())
    with pytest.raises(DataError, match=r"more than --max_skipped 0\.46 allows"):
        build(bad_lines, tiny_base, max_skipped=0.46)
    assert len(build(bad_lines, tiny_base, max_skipped=0.47)) == 14


def test_24_the_same_ones_on_all_ranks(bad_lines: Path, job: Job) -> None:
    """Which compare what they have read, and train on it."""
    done = job.run("--data_config", str(bad_lines), "--max_skipped", "1", "--max_steps", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("skipped 1: ") == len(BAD_LINES)
    assert all(np.isfinite(list(job.losses.values())))
    done = job.run("--data_config", str(bad_lines), "--max_skipped", "0.1", "--overwrite")
    assert "DataError: 12 of 26 records cannot be used" in said(done)
    assert (job.status["status"], job.status["reason"]) == (3, "DataError")


CANARY = "canary"
BAD_YAML = {
    "unknown key": ("METTA: []", r"expected a list of data entries under the key META"),
    "typo": ("META:\n- {path: PATH, prompt_typ: none}", r"'prompt_typ'\. Did you mean 'prompt_type'"),
    "number as text": ("META:\n- {path: PATH, ratio: much}", r"'ratio' is 'much'"),
    "negative": ("META:\n- {path: PATH, ratio: -1}", r"'ratio' is -1"),
    "duplicate key": ("META:\n- {path: PATH, path: PATH}", r"the key 'path' stands twice"),
    "a class": ("META: !!python/object/apply:os.system ['touch CANARY']", r"is not valid YAML .*python/object/apply"),
    "an alias bomb": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi")),
        r"expected a list of data entries under the key META",
    ),
    "nested": ("META: " + "[" * 3000, r"is not valid YAML"),
    "not text": ("\x00\x01", r"cannot be read|is not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_YAML)
def test_25_bad_data_settings(name: str, job: Job, tmp_path: Path) -> None:
    text, words = BAD_YAML[name]
    data = tmp_path / "data.jsonl"
    data.write_text(GOOD)
    path = tmp_path / "data.yaml"
    path.write_text(text.replace("PATH", str(data)).replace("CANARY", str(tmp_path / CANARY)))
    with pytest.raises(DataError, match=words):
        finetune(parse(FinetuneConfig, job.flags("--data_config", str(path))))
    assert not (tmp_path / CANARY).exists()


def test_25_numbers_that_yaml_takes_for_text(tmp_path: Path, tiny_base: Path) -> None:
    """`1e-1` is a text in YAML 1.1, and a tenth to everybody."""
    (tmp_path / "data.json").write_text(json.dumps([json.loads(GOOD)] * 50))
    (tmp_path / "data.yaml").write_text("META:\n- {path: data.json, ratio: 1e-1}")
    assert len(build(tmp_path / "data.yaml", tiny_base)) == 5


def test_25_bad_flags_and_settings_all_at_once(job: Job, tmp_path: Path, python) -> None:
    """With status 2, before any process is waited for or a weight read."""
    flags = ("--lr", "fast", "--batch_sise", "4", "--max_skipped", "2", "--save_minutes", "-1", "--not_finite", "igore")
    done = python(ROOT / "accessory" / "main_finetune.py", *job.flags(*flags), RANK="0", WORLD_SIZE="2")
    assert done.returncode == 2  # rank 1 would be waited for longer than `python` waits
    for words in ("--lr is 'fast'", "Did you mean '--batch_size'", "--max_skipped", "--save_minutes", "'igore'"):
        assert words in done.stderr, words
    bad, misspelt = tmp_path / "settings.json", {"lora_rank": "lora_rnak", "r": "side_haeds"}[SIZE]
    for text, words in (
        (f'{{"{misspelt}": 4}}', "Did you mean 'lora_rank'" if SIZE != "r" else "Did you mean 'side_heads'"),
        (f'{{"{SIZE}": -4}}', f"'{SIZE}' is -4"), (f'{{"{SIZE}": "four"}}', f"'{SIZE}' is 'four'"),
        (f'{{"{SIZE}": 4', "settings.json: found"), ("[" * 100_000, "settings.json: found"),
        (f'{{"{SIZE}": 1e999}}', f"'{SIZE}' is inf"),
    ):  # fmt: skip
        bad.write_text(text)
        with pytest.raises(AccessoryError, match=re.escape(words)):
            finetune(parse(FinetuneConfig, job.flags("--llama_config", str(bad))))


INTEGERS = torch.ones(128, dtype=torch.int64)
BAD_WEIGHTS = {
    "wrong shape": (lambda w: w | {"model.norm.weight": torch.ones(64)}, r"norm.weight has shape \(64,\)"),
    "missing key": (lambda w: {k: v for k, v in w.items() if ".1.mlp.up" not in k}, r"1\.feed_forward\.w3.*missing"),
    "extra key": (lambda w: w | {"model.layers.0.extra.weight": INTEGERS}, r"0\.extra\.weight has no place"),
    "wrong type": (lambda w: w | {"model.norm.weight": INTEGERS}, r"norm\.weight holds I64; expected floating-point"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_26_bad_weights(name: str, job: Job, copy) -> None:
    """Named, and nothing is trained."""
    change, words = BAD_WEIGHTS[name]
    base = copy(job.base)
    save_file(change(load_file(base / "model.safetensors")), base / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        finetune(parse(FinetuneConfig, job.flags("--pretrained_path", str(base))))
    assert not list(job.output.glob("epoch*"))


def test_26_an_adapter_of_another_rank(job: Job, tmp_path: Path) -> None:
    job.ranks = 1
    finetune(parse(FinetuneConfig, job.flags("--max_steps", "1")))
    other = tmp_path / "other.json"
    other.write_text(settings(8))
    refusal, words = CheckpointError, r"lora_a\.weight has shape \(4, 128\), the model \(8, 128\)"
    if SIZE == "r":
        refusal, words = ConfigError, "epoch0-iter1: was trained with r 4, here it is 8"
    with pytest.raises(refusal, match=words):
        finetune(parse(FinetuneConfig, job.flags(
            "--pretrained_path", str(job.base), str(job.output / "epoch0-iter1"), "--llama_config", str(other),
            "--output_dir", str(tmp_path / "out"),
        )))  # fmt: skip


@pytest.mark.parametrize("content", [
    b"", b"junk" * 100, b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    bytes(range(256)) * 50,
], ids=["empty", "junk", "HTML", "LFS", "bytes"])  # fmt: skip
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_27_bad_tokenizers(name: str, content: bytes, job: Job, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=re.escape(str(path))) as caught:
        finetune(parse(FinetuneConfig, job.flags("--tokenizer_path", str(path))))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_27_a_crash_of_their_libraries_is_an_error(name: str, job: Job, tmp_path: Path, monkeypatch) -> None:
    """A file is tried in a process of its own first; here its library is made to crash, on a good one."""
    library = {"tokenizer.model": "sentencepiece", "tokenizer.json": "tokenizers"}[name]
    crash = "def load(*_):\n    import ctypes\n    return lambda text: ctypes.string_at(0)\n"
    monkeypatch.setitem(trial._TRIALS, library, crash)
    monkeypatch.setattr(trial, "_passed", set())
    path = tmp_path / name
    if library == "tokenizers":
        path.write_bytes((job.base / name).read_bytes())
    else:
        path.write_bytes(small_sentencepiece())
    with pytest.raises(TokenizerError, match=rf"{name}: .* {library} was brought down by it \(SIGSEGV\)\.$"):
        finetune(parse(FinetuneConfig, job.flags("--tokenizer_path", str(path))))
    assert not list(job.output.glob("epoch*"))


def test_27_a_vocabulary_larger_than_the_embedding(job: Job, copy) -> None:
    base = copy(job.base)
    vocabulary = json.loads((base / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["more"] = 512  # a piece, not a token that somebody added
    (base / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises((TokenizerError, ConfigError), match=r"513 tokens.*512 rows"):
        finetune(parse(FinetuneConfig, job.flags("--tokenizer_path", str(base))))
