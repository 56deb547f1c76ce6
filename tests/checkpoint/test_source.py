"""What is known of an opened checkpoint: settings, kind, fingerprint; and the JSON beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import (
    model_args_of,
    open_safetensors,
    read_json,
    settings_read_by,
    stated_llama_type,
    stated_settings,
)
from accessory.errors import CheckpointError
from accessory.model.args import ModelArgs


@pytest.mark.parametrize(("content", "expected"), [
    ("[1]", "holds a list; expected a JSON object"), ("{", "found a JSON-like text of 1 bytes; expected a JSON object"),
])  # fmt: skip
def test_read_json(tmp_path: Path, content: str, expected: str) -> None:
    """Whatever is not a JSON object."""
    path = tmp_path / "params.json"
    path.write_text(content)
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    assert str(path) in str(caught.value) and expected in str(caught.value)
    with pytest.raises(CheckpointError, match=r"gone\.json: cannot be read"):
        read_json(tmp_path / "gone.json")


def test_a_byte_order_mark_before_json_is_none_of_it(tmp_path: Path) -> None:
    """As editors on Windows write one."""
    (tmp_path / "lora.json").write_text('{"lora_rank": 8}', encoding="utf-8-sig")
    assert read_json(tmp_path / "lora.json") == {"lora_rank": 8}


def test_fingerprint_moves_with_every_part(tiny_base: Path, copy) -> None:
    """The same for a copy; another for a changed first or last byte, and for another name."""
    directory = copy(tiny_base)
    path = directory / "model.safetensors"
    original = open_source(tiny_base).fingerprint()
    assert open_source(directory).fingerprint() == original
    state = load_file(path)
    seen = {original}
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        state[name].view(-1)[-1] += 1
        save_file(state, path)
        seen.add(open_source(directory).fingerprint())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    seen.add(open_source(directory).fingerprint())
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("name", "sharded", "layout"),
    [("hf", False, "halves"), ("meta2", True, "pairs"), ("upstream2", True, "pairs"), ("ours", False, "pairs")],
)
def test_what_it_is(formats: dict[str, Path], name: str, sharded: bool, layout: str) -> None:
    """Whether other software cut it, which channels rotate together, and that nothing is packed."""
    source = open_source(formats[name])
    assert (source.is_sharded, source.rotary_layout, source.storage) == (sharded, layout, None)


def test_settings_beside_the_weights(tmp_path: Path) -> None:
    """config.json before params.json; none is no fault; the type stands in meta.json."""
    assert stated_settings(tmp_path) is None and stated_llama_type(tmp_path) is None
    (tmp_path / "params.json").write_text('{"dim": 1}')
    assert stated_settings(tmp_path) == {"dim": 1}
    (tmp_path / "config.json").write_text('{"dim": 2}')
    assert stated_settings(tmp_path) == {"dim": 2}
    (tmp_path / "meta.json").write_text('{"llama_type": "opt_peft"}')
    assert stated_llama_type(tmp_path) == "opt_peft"


def test_a_methods_keys_are_no_model_settings(formats: dict[str, Path], copy) -> None:
    """A file of both gives the model its own."""
    directory = copy(formats["ours"])
    settings = read_json(directory / "config.json")
    (directory / "config.json").write_text(json.dumps(settings | {"lora_rank": 8}))
    assert model_args_of(open_source(directory)) == ModelArgs(**settings)


@pytest.mark.parametrize(("error", "expected"), [
    (KeyError("hidden_size"), r"here\.json: 'hidden_size' is missing; expected the model's settings\."),
    (TypeError("odd"), r"here\.json: its settings do not make a model \(odd\)\."),
    (ZeroDivisionError("by zero"), r"here\.json: its settings do not make a model \(by zero\)\."),
])  # fmt: skip
def test_complaints_of_a_reader(error: Exception, expected: str) -> None:
    """Whatever reading settings runs into is said of the file."""

    def read() -> ModelArgs:
        raise error

    with pytest.raises(CheckpointError, match=expected):
        settings_read_by(read, Path("here.json"))
    with pytest.raises(CheckpointError, match=r"here\.json: 'n_heads' is 'many'"):
        settings_read_by(lambda: ModelArgs(n_heads="many"), Path("here.json"))


def test_tensors_of_several_files(tmp_path: Path, weights) -> None:
    """Each by its name, unread, with its shape and the file's word for its type."""
    for i, name in enumerate(("norm.weight", "output.weight")):
        save_file({name: weights[name]}, tmp_path / f"{i}.safetensors")
    tensors = open_safetensors([tmp_path / "0.safetensors", tmp_path / "1.safetensors"])
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == {
        "norm.weight": ((128,), "F32"), "output.weight": ((512, 128), "F32"),
    }  # fmt: skip
