"""tools/random_checkpoint.py as a process: what it writes is what transformers would make of the same settings."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from accessory.meta import MetaModel

CONFIG = {
    "model_type": "gpt_neox", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
    "intermediate_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = torch.arange(30) * 7 % 300


def test_any_shape(python, tmp_path: Path) -> None:
    """A config.json becomes a checkpoint that both load, with a tokenizer for any text."""
    shape, target = tmp_path / "shape.json", tmp_path / "out"
    shape.write_text(json.dumps(CONFIG))
    done = python("tools/random_checkpoint.py", target, "--shape", shape, "--dtype", "fp32")
    assert done.returncode == 0, done.stderr[-3000:]
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, output_loading_info=True
    )
    assert isinstance(model, transformers.GPTNeoXForCausalLM) and not any(report.values()), report
    count = sum(parameter.numel() for parameter in model.parameters())
    assert done.stdout == f"{target}: {count:,} random parameters in fp32\n"
    ours = MetaModel.from_pretrained(target, dtype="fp32")
    with torch.no_grad():
        assert (model(TOKENS[None]).logits[0] - ours.logits(TOKENS, (30,))).abs().max() < 1e-4
    text = "Zürich, 東京 & 1 + 1"
    assert ours.tokenizer.decode(ours.tokenizer.encode(text)) == text
    assert transformers.AutoTokenizer.from_pretrained(target)(text).input_ids == ours.tokenizer.encode(text)


def test_seed(called, tmp_path: Path) -> None:
    """The same gives the same bits, another others; what is there is not replaced."""
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(CONFIG))
    for name, seed in (("one", "0"), ("same", "0"), ("other", "1")):
        done = called("tools/random_checkpoint.py", tmp_path / name, "--shape", shape, "--seed", seed)
        assert done.returncode == 0, done.stderr[-3000:]
    one, same, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "same", "other"))
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in one)
    assert {tensor.dtype for tensor in one.values()} == {torch.float16}
    done = called("tools/random_checkpoint.py", tmp_path / "one", "--shape", shape, "--seed", "1")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        f"CheckpointError: {tmp_path / 'one'}: found"
    )
    assert torch.equal(load_file(tmp_path / "one" / "model.safetensors")["embed_out.weight"], one["embed_out.weight"])


def test_shape_that_makes_no_model(python, tmp_path: Path) -> None:
    """The file and what is wrong in it are named; nothing is written."""
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(CONFIG | {"hidden_size": "wide"}))
    done = python("tools/random_checkpoint.py", tmp_path / "out", "--shape", shape)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("CheckpointError: ") and str(shape) in done.stderr and "wide" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["shape.json"]
