"""A base in another format computes what it did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from accessory.errors import CheckpointError
from accessory.export import (
    Destination,
    convert,
    open_base,
    transformers_hint,
)
from tests.export.models import TOKENS, TOLERANCE, apart, ours, saved_whole, theirs, written, written_by
from tests.model.families.matrix import baichuan2


@pytest.mark.parametrize("to", ["accessory", "hf", "gguf", "meta", "upstream"])
def test_bit_for_bit(tiny_base: Path, to: str, tmp_path: Path) -> None:
    """fp32 to fp32, but for the order of the rows of q and k."""
    target = tmp_path / f"out.{to}"
    convert([tiny_base], target, Destination(to, "fp32", "f32"))
    before, after = (open_base([path])[0].in_layout("pairs").tensors for path in (tiny_base, target))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name].read(), tensor.read()) for name, tensor in before.items())
    assert apart(ours(target), ours(tiny_base)) < TOLERANCE


@pytest.mark.parametrize(("dtype", "said"), [("bf16", "BF16"), ("fp16", "F16")])
def test_dtype(tiny_base: Path, dtype: str, said: str, tmp_path: Path) -> None:
    """Of every tensor."""
    convert([tiny_base], tmp_path / "out", Destination("hf", dtype))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {said}  # noqa: SIM118


def test_normalized_head(tiny_base: Path, tmp_path: Path) -> None:
    """A Baichuan 2 with a vocabulary of any size becomes a LLaMA that needs no such head."""
    reference = written_by(baichuan2, tiny_base, tmp_path / "base")
    convert([tmp_path / "base"], tmp_path / "llama", Destination("hf", "fp32", architecture="llama"))
    assert apart(theirs(tmp_path / "llama"), reference.logits(TOKENS)) < TOLERANCE
    assert transformers_hint(tmp_path / "llama") is None


def test_trained_parts_are_refused(part: Path, tmp_path: Path) -> None:
    """Alone, and in one directory with their base, where LoRA and biases would be lost in silence."""
    for path in (part, saved_whole(part, tmp_path / "whole")):
        for to in ("accessory", "hf"):
            with pytest.raises(CheckpointError, match=rf"{path}: .*merge it \(tools/merge.py\)"):
                convert([path], tmp_path / "out", Destination(to))
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_upstream_keeps_biases_beside_the_base(base_of, tmp_path: Path) -> None:
    """As trained ones, for want of another place; merging brings them back."""
    base = base_of("biased")
    convert([base], tmp_path / "upstream", Destination("upstream", "fp32"))
    assert apart(ours(tmp_path / "upstream"), ours(base)) < TOLERANCE
    with pytest.raises(CheckpointError, match=r"holds what was trained .* llama_peft.*merge it"):
        convert([tmp_path / "upstream"], tmp_path / "hf", Destination())
    assert apart(theirs(written([tmp_path / "upstream"], tmp_path / "hf")), theirs(base)) < TOLERANCE
