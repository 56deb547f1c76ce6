"""Opening whatever a user gives: the format is told from the files, and what is not a checkpoint is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import model_args_of, read_json
from accessory.errors import CheckpointError

NAMES = {
    "hf": "Hugging Face", "hf_sharded": "Hugging Face", "meta1": "Meta", "meta2": "Meta", "llama3_2": "Meta",
    "upstream1": "LLaMA2-Accessory", "upstream2": "LLaMA2-Accessory", "gguf": "GGUF", "ours": "Accessory",
    "ours_sharded": "Accessory",
}  # fmt: skip


def refusal(path: str | Path) -> str:
    """What `open_source` says against `path`."""
    with pytest.raises(CheckpointError) as caught:
        open_source(path)
    return str(caught.value)


def test_every_format_holds_the_same(formats: dict[str, Path], weights, format_name: str) -> None:
    """Format, names, shapes and settings."""
    source = open_source(formats[format_name])
    assert source.format == NAMES[format_name]
    assert {name: tensor.shape for name, tensor in source.tensors.items()} == {
        name: tuple(weight.shape) for name, weight in weights.items()
    }
    args = model_args_of(source)
    assert (args.dim, args.n_layers, args.n_heads, args.n_kv_heads, args.hidden_dim) == (128, 2, 4, 2, 256)
    assert (args.norm_eps, args.rope_theta, args.tie_word_embeddings) == (pytest.approx(1e-5), 10000.0, False)
    assert not source.is_delta and source.run is None
    assert source.llama_type == ("llama" if format_name.startswith("ours") else None)


def test_tied_head_is_no_tensor(tiny_base: Path, copy) -> None:
    """A head that some files hold beside the embedding it is tied to would have no place in the model."""
    directory = copy(tiny_base)
    config = read_json(directory / "config.json") | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    assert "output.weight" not in open_source(directory).tensors


def test_paths_that_are_nothing(tmp_path: Path) -> None:
    """A path that is not there, an empty directory, a directory of other things."""
    assert f"{tmp_path / 'gone'}: no such checkpoint. Expected a directory with model.safetensors" in refusal(
        tmp_path / "gone"
    )
    assert f"{tmp_path}: found nothing. Expected" in refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "pytorch_model.bin").write_text("hello")
    assert f"{tmp_path}: found notes.txt, pytorch_model.bin. Expected" in refusal(tmp_path)


def test_files_that_are_nothing(tmp_path: Path, fake: tuple[str, bytes]) -> None:
    """Given as the checkpoint itself, as a GGUF file, and as safetensors of either directory format."""
    what, content = fake
    for name in ("model.bin", "model.gguf", "ours/model.safetensors", "hf/model.safetensors"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    shutil.copy(tmp_path / "model.bin", tmp_path / "hf" / "config.json")
    assert f"{tmp_path / 'model.bin'}: found a{'n' * what.startswith(('empty', 'HTML'))} {what}" in refusal(
        tmp_path / "model.bin"
    )
    message = refusal(tmp_path / "model.gguf")
    assert str(tmp_path / "model.gguf") in message and what in message and "cannot be read as GGUF" in message
    message = refusal(tmp_path / "ours")
    assert str(tmp_path / "ours" / "model.safetensors") in message and what in message and "as safetensors" in message
    message = refusal(tmp_path / "hf")
    assert str(tmp_path / "hf" / "config.json") in message and what in message and "a JSON object" in message


def test_pointer_beside_a_good_config(tiny_base: Path, copy, fake: tuple[str, bytes]) -> None:
    """A Hugging Face directory cloned without its large files."""
    directory = copy(tiny_base)
    (directory / "model.safetensors").write_bytes(fake[1])
    message = refusal(directory)
    assert str(directory / "model.safetensors") in message and fake[0] in message


@pytest.mark.parametrize("kept", [0.001, 0.5, 0.9999])
def test_truncated_safetensors(tiny_base: Path, copy, kept: float) -> None:
    """Cut in the header, in the middle, and by the last bytes."""
    directory = copy(tiny_base)
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: int(len(content) * kept)])
    assert f"{directory / 'model.safetensors'}: found a" in refusal(directory)


@pytest.mark.parametrize("kept", [0.001, 0.01, 0.5, 0.9999])
def test_truncated_gguf(formats: dict[str, Path], tmp_path: Path, kept: float) -> None:
    """The same of a GGUF file."""
    content, path = formats["gguf"].read_bytes(), tmp_path / "cut.gguf"
    path.write_bytes(content[: int(len(content) * kept)])
    assert f"{path}: found a GGUF file of" in refusal(path)


def test_missing_hugging_face_shard(hf_sharded: Path, tiny_base: Path, copy) -> None:
    """One file of several, and the only one."""
    directory = copy(hf_sharded)
    (directory / "model-00002-of-00003.safetensors").unlink()
    message = refusal(directory)
    assert message.startswith(
        f"{directory}: model-00002-of-00003.safetensors is missing; found config.json, model-00001"
    )
    shutil.rmtree(directory)
    copy(tiny_base)
    (directory / "model.safetensors").unlink()
    assert f"{directory}: model.safetensors is missing; found config.json" in refusal(directory)


@pytest.mark.parametrize(("content", "expected"), [
    ("{}", "holds no 'weight_map'"), ('{"weight_map": ["a"]}', "holds no 'weight_map'"), ("{", "a JSON-like text"),
    ('{"weight_map": {"a": "../../model.safetensors"}}', "names ../../model.safetensors; expected files beside it"),
])  # fmt: skip
def test_broken_index(hf_sharded: Path, copy, content: str, expected: str) -> None:
    """What names the shards is itself a file that may be wrong."""
    directory = copy(hf_sharded)
    (directory / "model.safetensors.index.json").write_text(content)
    message = refusal(directory)
    assert str(directory / "model.safetensors.index.json") in message and expected in message


@pytest.mark.parametrize(("change", "expected"), [
    ({"model_type": "bert"}, "model_type 'bert' is not supported; known: llama"),
    ({"hidden_size": None}, "'dim' is None"),
    ({"hidden_size": "wide"}, "'dim' is 'wide'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope scaling 'yarn' is not supported"),
    ({"quantization_config": {"load_in_4bit": True}}, "already quantized; give the full-precision checkpoint"),
])  # fmt: skip
def test_settings_that_cannot_be_used(tiny_base: Path, copy, change: dict, expected: str) -> None:
    """Another architecture, values of a wrong kind, a model that is already quantized."""
    directory = copy(tiny_base)
    (directory / "config.json").write_text(json.dumps(read_json(directory / "config.json") | change))
    message = refusal(directory)
    assert str(directory) in message and expected in message


def test_settings_that_are_missing(tiny_base: Path, formats, weights, write_gguf, tmp_path: Path, copy) -> None:
    """A config.json and a GGUF file that do not say how wide the model is."""
    directory = copy(tiny_base)
    config = read_json(directory / "config.json")
    del config["hidden_size"]
    (directory / "config.json").write_text(json.dumps(config))
    assert f"{directory / 'config.json'}: 'hidden_size' is missing" in refusal(directory)
    path = write_gguf(tmp_path / "a.gguf", weights, drop="embedding_length")
    message = refusal(path)
    assert f"{path}: 'dim' is None" in message


def test_gguf_of_another_kind(tmp_path: Path) -> None:
    """Another architecture, and a type of tensor that has no decoder."""
    writer = gguf.GGUFWriter(tmp_path / "falcon.gguf", "falcon")
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    assert "falcon.gguf: architecture 'falcon' is not supported; known: llama." in refusal(tmp_path / "falcon.gguf")
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), dtype=np.int32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    assert "odd.gguf: token_embd.weight is stored as I32, which cannot be read" in refusal(tmp_path / "odd.gguf")


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


def test_trained_part(formats: dict[str, Path], tmp_path: Path, weights) -> None:
    """trainable.safetensors is a trained part, and says of which kind and run."""
    save_file({"norm.weight": weights["norm.weight"]}, tmp_path / "trainable.safetensors")
    (tmp_path / "meta.json").write_text('{"llama_type": "llama_peft"}')
    (tmp_path / "run.json").write_text('{"base": []}')
    source = open_source(tmp_path)
    assert (source.format, source.is_delta, source.llama_type) == ("Accessory (trained part)", True, "llama_peft")
    assert source.run == {"base": []}
    assert source.settings is None and model_args_of(source) is None


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
