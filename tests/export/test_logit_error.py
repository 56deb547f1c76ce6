"""How far the logits of two models are apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from accessory.data.templates import format_prompt
from accessory.errors import ConfigError
from accessory.export import (
    PROBE_ANSWER,
    logit_error,
)
from accessory.tokenizer import open_tokenizer
from tests.checkpoint.trained import write_trained


def test_zero_for_the_same(part: Path) -> None:
    """Bit for bit."""
    found = logit_error([part], part, PROBE_ANSWER)
    assert (found.largest, found.mean, found.changed) == (0.0, 0.0, 0)


def test_by_hand(tiny_base: Path, tmp_path: Path) -> None:
    """Against transformers' logits of the same text, for a head that has been changed."""
    changed = Path(shutil.copytree(tiny_base, tmp_path / "changed"))
    stored = load_file(tiny_base / "model.safetensors")
    stored["lm_head.weight"][:100] += 0.02 * torch.randn(100, 128, generator=torch.Generator().manual_seed(3))
    save_file(stored, changed / "model.safetensors")
    text = "What is Accessory? Answer in one line."
    ids = transformers.AutoTokenizer.from_pretrained(tiny_base)(text, add_special_tokens=False).input_ids
    ids = torch.tensor([[0, *ids]])
    with torch.no_grad():
        models = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in (tiny_base, changed)]
        first, second = (model(ids).logits[0].double() for model in models)
    found = logit_error([tiny_base], changed, text, "fp32")
    assert found.tokens == ids.shape[1]
    assert found.largest == pytest.approx(float((first - second).abs().max()), abs=1e-4) and found.largest > 0.1
    assert found.mean == pytest.approx(float((first - second).abs().mean()), abs=1e-5)
    assert found.changed == int((first.argmax(-1) != second.argmax(-1)).sum()) > 0
    assert str(found) == (
        f"logits differ by {found.largest:.4f} at most and {found.mean:.5f} on average over {found.tokens} probe "
        f"tokens; the likeliest next token is another at {found.changed} of them"
    )


def test_padded_vocabulary(tiny_base: Path, tmp_path: Path) -> None:
    """Rows that only one of them has are left out."""
    padded = Path(shutil.copytree(tiny_base, tmp_path / "padded"))
    stored = load_file(tiny_base / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        stored[name] = torch.cat([stored[name], torch.ones(8, 128)])
    save_file(stored, padded / "model.safetensors")
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(config | {"vocab_size": 520}))
    assert logit_error([tiny_base], padded, PROBE_ANSWER, "fp32").largest < 1e-4


def test_probe_is_asked_as_it_was_trained(tiny_base: Path, tmp_path: Path) -> None:
    part = write_trained(tiny_base, tmp_path / "part")
    run = json.loads((part / "run.json").read_text())
    counts = []
    for layout in ("alpaca", "none"):
        (part / "run.json").write_text(json.dumps(run | {"prompt_layouts": {layout: 9}}))
        counts.append(logit_error([part], part).tokens)
    tokenizer = open_tokenizer(tiny_base)
    words = len(tokenizer.encode(format_prompt("Why?"))) - len(tokenizer.encode("Why?"))
    assert counts[0] - counts[1] == words


def test_probe_is_cut(base_of, tiny_base: Path) -> None:
    """To 256 tokens, and to what the model has positions for."""
    assert logit_error([tiny_base], tiny_base, PROBE_ANSWER * 9).tokens == 256
    assert logit_error([base_of("opt")], base_of("opt"), PROBE_ANSWER).tokens == 32


def test_precision(tiny_base: Path) -> None:
    """An unknown one is named with the nearest."""
    with pytest.raises(ConfigError, match=r"--precision 'fp33' is unknown. Did you mean 'fp32'"):
        logit_error([tiny_base], tiny_base, PROBE_ANSWER, "fp33")
