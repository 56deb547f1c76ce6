"""tools/evaluate.py as a process: its table, its JSON and its predictions, alike on any ranks and bases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from accessory.meta import MetaModel
from tests.conftest import DATA
from tests.eval.published import write_published

TOOL = "tools/evaluate.py"


def line_of(done) -> dict:
    """The last line of what a process printed."""
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_perplexity_is_the_same_on_ranks(called, torchrun, tiny_base: Path, tmp_path: Path) -> None:
    """One process, two that divide the windows, and two that divide the model; a packed base is another model."""
    text = tmp_path / "text.txt"
    text.write_text(DATA.read_text()[:3000])
    flags = [
        tiny_base,
        "--perplexity",
        text,
        "--seq",
        64,
        "--windows",
        5,
        "--dtype",
        "fp32",
        "--json",
        "--device",
        "cpu",
    ]
    alone = called(TOOL, *flags)
    one = line_of(alone)["perplexity"]
    row = f"| perplexity | of 5 windows of 64 | {one['value']:.4f} | {one['stderr']:.4f} |"
    assert row in alone.stdout and one["seq"] == 64
    for ways in ("1", "2"):
        two = line_of(torchrun(2, TOOL, *map(str, flags), "--model_parallel_size", ways))["perplexity"]
        assert two == pytest.approx(one, rel=1e-4)
    packed = line_of(called(TOOL, *flags, "--quant"))["perplexity"]
    assert packed["value"] != pytest.approx(one["value"], rel=1e-3)


@pytest.mark.slow
def test_mmlu_and_texts(called, tiny_base: Path, tmp_path: Path) -> None:
    """Both from files; texts need no model."""
    questions, texts = tmp_path / "mmlu.json", tmp_path / "predictions.jsonl"
    rows = [{"subject": s, "input": f"{s} {i}?\nAnswer:", "output": "A"} for s in ("law", "art") for i in range(3)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = called(TOOL, tiny_base, "--mmlu", questions, "--dtype", "fp32", "--json", "--device", "cpu")
    found = line_of(done)["mmlu"]
    assert list(found) == ["accuracy", "loss", "art", "law"]
    assert f"| mmlu   | accuracy | {found['accuracy']['value']:.4f} |" in done.stdout
    pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    texts.write_text('{"prediction": "a b c d e", "output": "a b c d e"}\n')
    assert line_of(called(TOOL, "--texts", texts, "--json"))["texts"]["rouge-2"] == {"value": 100, "stderr": None}


def test_tasks(called, torchrun, tiny_base: Path, tmp_path: Path) -> None:
    """A group and a task: rows, object, and a line for each document; two ranks print the same once."""
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    data, out = write_published(tmp_path / "data"), tmp_path / "made" / "predictions.jsonl"
    flags = [tiny_base, "--tasks", "piqa,arc_easy", "--task_data", data, "--limit", 4, "--dtype", "fp32", "--device",
             "cpu", "--json", "--predictions", out]  # fmt: skip
    alone = called(TOOL, *flags)
    line = line_of(alone)
    assert line["protocol"] == "0.4" and list(line["tasks"]) == ["piqa", "arc_easy"]
    piqa = line["tasks"]["piqa"]
    assert set(piqa) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "documents", "num_fewshot", "seconds"}
    assert (piqa["documents"], piqa["num_fewshot"]) == (4, 0)
    assert f"| piqa     |     0 | acc      | {piqa['acc']:.4f} | {piqa['acc_stderr']:.4f} |         4 |" in alone.stdout
    assert "protocol 0.4, without a chat template" in alone.stdout.splitlines() and line["chat_template"] is False
    predictions = [json.loads(row) for row in out.read_text().splitlines()]
    assert [row["task"] for row in predictions] == ["piqa"] * 4 + ["arc_easy"] * 4
    found = [max(range(2), key=lambda i: row["responses"][i][0]) == row["target"] for row in predictions[:4]]
    assert found == [bool(row["acc"]) for row in predictions[:4]] and sum(found) / 4 == piqa["acc"]
    two = torchrun(2, TOOL, *map(str, flags))
    assert two.stdout.count('{"model"') == 1
    for task in ("piqa", "arc_easy"):
        same = {name: value for name, value in line["tasks"][task].items() if name != "seconds"}
        assert same.items() <= line_of(two)["tasks"][task].items()


def test_memory_that_runs_out_is_told(called, tiny_base: Path, tmp_path: Path, monkeypatch) -> None:
    """In one line, with flags that would need less."""
    (tmp_path / "text.txt").write_text("Hello. " * 20)
    (tmp_path / "mmlu.json").write_text('{"subject": "law", "input": "?", "output": "A"}\n')

    def fail(*_given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(MetaModel, "token_scores", fail)
    for flags in (["--perplexity", tmp_path / "text.txt", "--seq", "8"], ["--mmlu", tmp_path / "mmlu.json"]):
        done = called(TOOL, tiny_base, *flags, "--device", "cpu")
        assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
            f"OutOfMemoryError: {flags[0]}: out of memory. Less memory is needed with a smaller --"
        )


def test_what_cannot_be(called, tiny_base: Path, tmp_path: Path) -> None:
    """Nothing to do, a file that is not there: one line, status 1."""
    for flags, said in (([], "ConfigError: Expected MODEL with --tasks, --perplexity or --mmlu"),
                        (["--perplexity", tmp_path / "no.txt"], "DataError: --perplexity"),
                        (["--tasks", "piqa", "--predictions", tmp_path],
                         f"ConfigError: --predictions {tmp_path}: is a directory; expected a file."),
                        (["--mmlu", "x", "--predictions", "p.jsonl"],
                         "ConfigError: --predictions p.jsonl: goes with --tasks"),
                        (["--task", "piqa"], "ConfigError: Unknown flag --task. Did you mean '--tasks'?")):  # fmt: skip
        done = called(TOOL, tiny_base, *flags)
        assert done.returncode == 1 and done.stderr.startswith(said), done.stderr
