"""tools/benchmark.py as a process: what it measures is what training does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from accessory.data.corpus import build_corpus
from accessory.tokenizer import open_tokenizer

DATA = Path(__file__).resolve().parents[2] / "data_example" / "accessory_qa.json"


def test_losses_tokens_and_counts(python, tiny_base: Path) -> None:
    """Four steps of LoRA in fp32: the first loss is the base's by transformers, the later ones fall."""
    done = python(
        "tools/benchmark.py", "train", "--model", tiny_base, "--data", DATA, "--steps", "4", "--batch_size", "4",
        "--rank", "4", "--lr", "0.01", "--precision", "fp32", "--max_words", "160", "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    corpus = build_corpus(DATA, open_tokenizer(tiny_base), max_words=160)
    assert (result["system"], result["method"], result["device"], result["steps"]) == ("accessory", "lora", "cpu", 4)
    assert result["tokens"] == int(corpus.lengths[8:16].sum())  # two steps of four documents warm up
    assert result["tokens_per_s"] == pytest.approx(result["tokens"] / result["seconds"], rel=0.2)
    shapes = [(128, 128), (128, 64), (128, 64), (128, 128), (128, 256), (128, 256), (256, 128)]
    assert result["trainable"] == 2 * 4 * sum(wide + high for wide, high in shapes)
    assert result["peak_bytes"] > 100 << 20
    assert len(result["losses"]) == 4
    assert result["losses"][0] == pytest.approx(base_loss(tiny_base, corpus, range(4)), abs=2e-4)
    assert result["losses"][3] < result["losses"][0]


@torch.no_grad()
def base_loss(base: Path, corpus, documents: range) -> float:
    """Mean over all supervised tokens of `documents`, by transformers, one document at a time."""
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    total = count = 0.0
    for i in documents:
        tokens, labels = corpus.document(i)
        logits = model(torch.tensor(tokens, dtype=torch.long)[None]).logits[0]
        total += F.cross_entropy(logits, torch.tensor(labels), reduction="sum").item()
        count += (labels >= 0).sum()
    return total / count


def test_quantized_in_words(python, tiny_base: Path) -> None:
    """Without --json a line a number."""
    done = python(
        "tools/benchmark.py", "train", "--model", tiny_base, "--data", DATA, "--steps", "3", "--batch_size", "2",
        "--method", "normbias", "--quant", "--checkpointing", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines()[-10:]}
    assert list(shown) == [
        "system", "method", "device", "steps", "tokens", "seconds", "tokens_per_s", "peak_bytes", "trainable", "losses",
    ]  # fmt: skip
    biases = 128 + 64 + 64 + 128 + 256 + 256 + 128
    assert int(shown["trainable"]) == 2 * (biases + 2 * 128) + 128
    assert len(json.loads(shown["losses"])) == 3


@pytest.mark.parametrize(("flags", "message"), [
    (["--steps", "2"], "ConfigError: --steps 2: the first 2 are not timed, so more are needed."),
    (["--steps", "200"], "is enough for 19 steps of 8."),
])  # fmt: skip
def test_faults_are_one_sentence(python, tiny_base: Path, flags: list[str], message: str) -> None:
    """Status 1 and no traceback."""
    done = python("tools/benchmark.py", "train", "--model", tiny_base, "--data", DATA, "--device", "cpu", *flags)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
