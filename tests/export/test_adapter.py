"""What was trained, written for peft."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from accessory.checkpoint.opening import open_source
from accessory.errors import CheckpointError
from accessory.export import (
    Destination,
    convert,
    export_adapter,
    transformers_hint,
)
from tests.checkpoint.trained import write_trained
from tests.export.models import TOKENS, TOLERANCE, apart, ours, saved_whole, theirs, written, written_by
from tests.model.families.matrix import internlm


@pytest.fixture
def stacked(tiny_base: Path, tmp_path: Path) -> list[Path]:
    """A base, LoRA and norms trained on it, and LoRA trained on from those, whose scale is another."""
    first = write_trained(tiny_base, tmp_path / "first", bias_tuning=False)
    second = write_trained(tiny_base, tmp_path / "second", bias_tuning=False, norm_tuning=False, lora_alpha=10)
    stored = load_file(second / "trainable.safetensors")
    save_file({name: -0.7 * value for name, value in stored.items()}, second / "trainable.safetensors")
    run = json.loads((second / "run.json").read_text())
    run["base"].append({"path": str(first), "format": "ours", "fingerprint": open_source(first).fingerprint()})
    (second / "run.json").write_text(json.dumps(run))
    return [tiny_base, first, second]


def test_part_on_a_part(stacked: list[Path], tmp_path: Path) -> None:
    """One adapter holds the last part's tensors, and those of earlier parts that it lacks (here the norms)."""
    base, first, second = stacked
    expected = ours(second)
    for i, paths in enumerate(([second], stacked)):
        target = tmp_path / f"adapter{i}"
        assert export_adapter(paths, target, drop_biases=False) is None
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(model, target).eval()
        with torch.no_grad():
            assert apart(model(TOKENS[None]).logits[0], expected) < TOLERANCE
        assert apart(ours(base, target), expected) < TOLERANCE
    for other in ([base, first], [base]):
        assert apart(ours(*other), expected) > 0.1
    assert apart(theirs(written(stacked, tmp_path / "merged")), expected) < TOLERANCE


def test_base_that_transformers_cannot_open(tiny_base: Path, tmp_path: Path) -> None:
    """The note says to give --base_model, after which there is no note."""
    own = tmp_path / "own"
    convert([tiny_base], own, Destination("accessory", "fp32"))
    part = write_trained(own, tmp_path / "part", bias_tuning=False)
    note = export_adapter([part], tmp_path / "adapter", drop_biases=False)
    assert note.startswith(f"adapter_config.json names the base {own}, which transformers cannot open as it is (Acc")
    assert export_adapter([part], tmp_path / "named", drop_biases=False, base_name="me/base") is None
    config = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base"


def test_base_of_a_type_that_needs_code_of_its_own(tiny_base: Path, tmp_path: Path) -> None:
    """A note says that transformers knows no Baichuan, as for a written one; with auto_map it finds the code."""
    convert([tiny_base], tmp_path / "llama", Destination("hf", "fp32"))
    assert transformers_hint(tmp_path / "llama") is None
    base = tmp_path / "internlm"
    written_by(internlm, tiny_base, base)
    part = write_trained(base, tmp_path / "part", bias_tuning=False)
    said = export_adapter([part], tmp_path / "adapter", drop_biases=False)
    assert said.startswith(f"transformers knows no internlm of its own and cannot open {base} as it is: put ")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "x.Y"}}))
    assert export_adapter([base, part], tmp_path / "again", drop_biases=False) is None


def test_refusals(tiny_base: Path, part: Path, tmp_path: Path) -> None:
    """Anything but a base and trained parts."""
    whole = saved_whole(part, tmp_path / "whole")
    for paths in ([tiny_base], [tiny_base, whole], [whole]):
        with pytest.raises(CheckpointError, match="Expected a base and what was trained on it"):
            export_adapter(paths, tmp_path / "out", drop_biases=True)
