"""A whole model on its way to a writer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accessory.checkpoint.lazy import HeldTensor
from accessory.checkpoint.whole import progress, read_as, refuse_existing
from accessory.errors import CheckpointError
from accessory.export import open_whole


def test_rotary_layouts(tiny_base: Path, weights) -> None:
    """q and k as Meta's conversion script has them, the rest untouched, and back again."""
    model, _, _ = open_whole([tiny_base])
    assert model.args.rotary_layout == "halves"
    pairs = model.in_layout("pairs")
    assert pairs.args.rotary_layout == "pairs" and pairs.tensors.keys() == weights.keys()
    assert all(torch.equal(pairs.tensors[name].read(), weight) for name, weight in weights.items())
    back = pairs.in_layout("halves")
    assert back.args == model.args
    stored = load_file(tiny_base / "model.safetensors")
    for ours, theirs in (("attention.wq", "self_attn.q_proj"), ("attention.wk", "self_attn.k_proj")):
        found = back.tensors[f"layers.1.{ours}.weight"].read()
        assert torch.equal(found, stored[f"model.layers.1.{theirs}.weight"])
        assert not torch.equal(found, weights[f"layers.1.{ours}.weight"])


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    """A file or a directory that holds something; not one that is empty or not there."""
    (tmp_path / "empty").mkdir()
    refuse_existing(tmp_path / "empty")
    refuse_existing(tmp_path / "new")
    (tmp_path / "file").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for name in ("file", "full"):
        with pytest.raises(CheckpointError, match=rf"{tmp_path / name}: found .* expected a new or empty directory"):
            refuse_existing(tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_copies(dtype: torch.dtype) -> None:
    """What is written over afterwards is not the file's memory."""
    tensor = HeldTensor(torch.ones(3))
    copy = read_as(tensor, dtype)
    copy.zero_()
    assert copy.dtype == dtype and torch.equal(tensor.value, torch.ones(3))


def test_progress_passes_everything_on() -> None:
    """In its order."""
    tensors = {name: HeldTensor(torch.ones(1)) for name in "cab"}
    assert list(progress(tensors, "writing")) == list(tensors.items())
