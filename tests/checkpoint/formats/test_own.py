"""Accessory's own directories: a base, plain or packed, and a trained part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accessory.checkpoint.formats.own import write_own
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import model_args_of, read_json
from accessory.checkpoint.whole import WholeModel
from accessory.errors import CheckpointError
from accessory.tokenizer import open_tokenizer


def test_trained_part(formats: dict[str, Path], tmp_path: Path, weights) -> None:
    """trainable.safetensors is a trained part, and says of which kind and run."""
    save_file({"norm.weight": weights["norm.weight"]}, tmp_path / "trainable.safetensors")
    (tmp_path / "meta.json").write_text('{"llama_type": "llama_peft"}')
    (tmp_path / "run.json").write_text('{"base": [], "quantization": null}')
    source = open_source(tmp_path)
    assert (source.format, source.is_delta, source.llama_type) == ("Accessory (trained part)", True, "llama_peft")
    assert source.run == {"base": [], "quantization": None}
    assert source.settings is None and model_args_of(source) is None


@pytest.fixture
def model(tiny_base: Path) -> WholeModel:
    """The tiny model, whole."""
    source = open_source(tiny_base)
    return WholeModel(model_args_of(source), source.tensors, open_tokenizer(tiny_base))


def test_plain_base_comes_back(model: WholeModel, tmp_path: Path) -> None:
    """Bit for bit, with its settings (the row order of q and k among them), type and tokenizer."""
    write_own(model, tmp_path / "out", torch.float32)
    source = open_source(tmp_path / "out")
    assert (source.format, source.llama_type, source.rotary_layout) == ("Accessory", "llama", "halves")
    assert model_args_of(source) == model.args
    assert source.tensors.keys() == model.tensors.keys()
    assert all(torch.equal(source.tensors[name].read(), tensor.read()) for name, tensor in model.tensors.items())
    assert open_tokenizer(tmp_path / "out").vocab_size == 512


@pytest.mark.parametrize(("change", "expected"), [
    ([1], r"meta.json: 'packed' is \[1\]; expected an object of matrices"),
    ({"layers.0.attention.wq.weight": {"shape": [1]}}, "meta.json: says .* of layers.0.attention.wq.weight; expected"),
    ({"layers.9.attention.wq.weight": {"shape": [128, 128], "quant_type": "nf4"}},
     "layers.9.attention.wq.weight is packed, but its codes, scales is missing"),
])  # fmt: skip
def test_damaged_record_of_packing(model: WholeModel, tmp_path: Path, change: object, expected: str) -> None:
    """What says how matrices are packed is itself a file that may be wrong."""
    write_own(model, tmp_path / "out", torch.float32, "nf4")
    meta = tmp_path / "out" / "meta.json"
    meta.write_text(json.dumps(read_json(meta) | {"packed": change}))
    with pytest.raises(CheckpointError, match=expected):
        open_source(tmp_path / "out")


def test_nothing_is_written_over(model: WholeModel, tmp_path: Path) -> None:
    """A directory with something in it stays as it is."""
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="expected a new or empty directory"):
        write_own(model, tmp_path, torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
