"""The entry starts in every way a user or a scheduler starts it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from accessory.data.corpus import build_corpus
from accessory.meta import MetaModel
from accessory.parallel import groups
from tests.conftest import copy_tokenizer

ROOT = Path(__file__).resolve().parent.parent
MAIN = ROOT / "accessory" / "main_finetune.py"


@pytest.fixture
def flags(tiny_base: Path, tmp_path: Path) -> list[str]:
    """A right call of two steps."""
    return [
        *("--pretrained_path", str(tiny_base), "--llama_type", "llama_peft", "--quant", "--only_save_trainable"),
        *("--data_config", str(ROOT / "data_example" / "accessory_qa.json"), "--device", "cpu", "--max_words", "160"),
        *("--batch_size", "4", "--accum_iter", "1", "--max_steps", "2", "--output_dir", str(tmp_path / "out")),
    ]


def check(done: subprocess.CompletedProcess, folder: Path) -> None:
    """The run went through and left its checkpoint."""
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "out" / "epoch0-iter2" / "trainable.safetensors").is_file()
    assert done.stdout.count("step      2/2 100.0%") == 1, done.stdout[-2000:]


def test_plain_python(flags: list[str], tmp_path: Path, python) -> None:
    done = python(MAIN, *flags)
    check(done, tmp_path)
    assert "trainable parameters: 2,688 of 428,672" in done.stdout
    assert "What is Accessory?\n\n### Response:«Accessory is" in done.stdout


def test_files_as_spreadsheets_and_editors_of_windows_write_them(flags: list[str], tmp_path: Path, python) -> None:
    """A table with commas, capitals in its suffix and a byte-order mark; settings and a YAML with one, too."""
    rows = [
        {"instruction": "q, or so", "output": "a" * 140_000, "note": ""},
        {"instruction": "q", "output": "a\nb"},
    ] * 3
    with (tmp_path / "data.CSV").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, ["instruction", "output", "note"], dialect="excel")
        table.writeheader()
        table.writerows([*rows, {"instruction": "q", "output": "c", "note": "why"}])
    (tmp_path / "data.yaml").write_text("META: [{path: data.CSV}]", encoding="utf-8-sig")
    (tmp_path / "lora.json").write_text('{"lora_rank": 2}', encoding="utf-8-sig")
    more = ("--data_config", tmp_path / "data.yaml", "--llama_config", tmp_path / "lora.json", "--dry_run")
    done = python(MAIN, *flags, *more)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "7 documents, " in done.stdout and "cut short at --max_words: 3" in done.stdout
    assert f"{tmp_path / 'data.CSV'}: columns separated by commas" in done.stdout
    assert f"not used: 'note' of 1 records, from {tmp_path / 'data.CSV'}:11 on" in done.stdout


def test_torchrun_from_inside_accessory(flags: list[str], tmp_path: Path, torchrun) -> None:
    check(torchrun(2, "main_finetune.py", *flags, cwd=ROOT / "accessory"), tmp_path)


def test_torchrun_module(flags: list[str], tmp_path: Path, torchrun) -> None:
    check(torchrun(1, "-m", "accessory.main_finetune", *flags), tmp_path)


def test_documents_beyond_learned_positions_end_the_run_before_it_begins(
    flags: list[str], tiny_base: Path, tmp_path: Path, python
) -> None:
    """In a dry run too. Rotation goes on, which is said."""
    data, base = tmp_path / "data.jsonl", tmp_path / "opt"
    lines = [json.dumps({"instruction": "q", "output": "word " * words}) for words in (3, 90, 3)]
    data.write_text("\n".join(lines))
    opt = transformers.OPTConfig(
        vocab_size=512, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32,
        max_position_embeddings=150, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.OPTForCausalLM(opt).save_pretrained(base)
    copy_tokenizer(tiny_base, base)
    opt_flags = [*flags, "--pretrained_path", base, "--llama_type", "opt_peft", "--data_config", data]
    done = python(MAIN, *opt_flags, "--dry_run")
    assert done.returncode == 3, done.stderr[-2000:]
    found = re.search(r"1 of 3 documents have more than 150 tokens; document 1 \((.*?):2\) has (\d+)\.", done.stderr)
    assert found and found[1] == str(data) and int(found[2]) > 150
    assert "cut them with --max_words 150." in done.stderr
    settings = json.loads((tiny_base / "config.json").read_text()) | {"max_position_embeddings": 150}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        shutil.copy(tiny_base / name, tmp_path / "base" / name)
    done = python(MAIN, *flags, "--pretrained_path", tmp_path / "base", "--data_config", data, "--dry_run")
    assert done.returncode == 0 and done.stdout.count("1 of 3 documents have more than 150 tokens") == 1
    assert "By its settings the model was made for no more; --max_words 150 cuts them" in done.stdout


@pytest.mark.parametrize("launcher", ["slurm", "openmpi"])
def test_scheduler_variables(launcher: str, flags: list[str], tmp_path: Path, clean_environment) -> None:
    """Two processes started by hand with a scheduler's variables find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    names = {
        "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
        "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    }[launcher]
    extra = ["--dist_on_itp"] if launcher == "openmpi" else []
    ranks = [
        subprocess.Popen(
            [sys.executable, str(MAIN), *flags, *extra],
            env=clean_environment | address | dict(zip(names, (str(rank), "2", str(rank)), strict=True)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=240) for rank in ranks]
    done = subprocess.CompletedProcess([], max(r.returncode for r in ranks), *map("".join, zip(*outputs, strict=True)))
    check(done, tmp_path)
    assert "on 2 x cpu: model parallel 1, data parallel 2" in done.stdout


def test_dry_run_steps_once_and_writes_nothing(flags: list[str], tmp_path: Path, python) -> None:
    done = python(MAIN, *flags, "--dry_run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "memory plan per rank" in done.stdout
    assert "step      1/1 100.0%" in done.stdout
    assert not list(tmp_path.iterdir())


def test_saves_within_and_after_epochs(flags: list[str], tmp_path: Path, python) -> None:
    more = ["--batch_size", "74", "--max_words", "256", "--epochs", "2", "--max_steps", "9"]
    done = python(MAIN, *flags, *more, "--save_iteration_interval", "1")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").glob("epoch*")} == {"epoch0", "epoch1", "epoch0-iter1", "epoch1-iter1"}
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("precision", ["fp16", "tf32", "bf16"])
def test_precisions_learn(precision: str, flags: list[str], tmp_path: Path, python) -> None:
    more = ["--precision", precision, "--max_steps", "8", "--lr", "5e-3", "--warmup_epochs", "0"]
    done = python(MAIN, *flags, *more)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.1, losses


def test_new_tokens_get_rows_that_are_learned(
    flags: list[str], tiny_base: Path, tmp_path: Path, torchrun, python
) -> None:
    """Two ranks share a vocabulary of 515 rows; what is saved knows the tokens and needs the base alone.

    They stand where the data spells them, one that looks like a control token too; what no document holds is said.
    """
    (tmp_path / "lora.json").write_text('{"lora_rank": 4, "vocabulary_tuning": true}')
    records = [{"instruction": "Add <one> and <|two|> to them. " * 3, "output": "<one> is <|two|> " * 9}] * 148
    (tmp_path / "new.json").write_text(json.dumps(records))
    extra = ("--llama_config", str(tmp_path / "lora.json"), "--new_tokens", "<one>", "<|two|>", "<three>")
    extra = (*extra, "--data_config", str(tmp_path / "new.json"))
    done = torchrun(2, MAIN, *flags, *extra, "--model_parallel_size", "2", "--lr", "0.01")
    check(done, tmp_path)
    assert "--new_tokens: no document holds <three>\n" in done.stdout
    assert "the tokenizer has 3 tokens more than the embedding's 512 rows" in done.stdout
    saved = load_file(tmp_path / "out" / "epoch0-iter2" / "trainable.safetensors")
    base = load_file(tiny_base / "model.safetensors")
    for ours, theirs in (("tok_embeddings.weight", "model.embed_tokens.weight"), ("output.weight", "lm_head.weight")):
        assert saved[ours].shape == (515, 128)
        assert (saved[ours][:512] - base[theirs]).abs().max() < 0.1  # two steps from where they were
        assert (saved[ours][512:] - base[theirs].mean(0)).abs().max() < 0.1
    assert not torch.equal(saved["output.weight"][512:], base["lm_head.weight"].mean(0).expand(3, -1))
    model = MetaModel.from_pretrained(tmp_path / "out" / "epoch0-iter2", dtype="fp32")
    assert model.tokenizer.vocab_size == 515
    assert torch.equal(model.llma.output.weight, saved["output.weight"])
    assert [i for i in model.prompt_tokens("a <one><|two|> b <|endoftext|>") if i >= 512] == [512, 513]
    run = json.loads((tmp_path / "out" / "epoch0-iter2" / "run.json").read_text())
    assert build_corpus(tmp_path / "new.json", model.tokenizer, max_words=160).fingerprint == run["data_fingerprint"]
    groups.stop()
    resumed = python(MAIN, *flags, *extra, "--lr", "0.01", "--resume", "latest", "--dry_run")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "no document holds <three>\n" in resumed.stdout
