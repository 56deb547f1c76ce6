"""Hugging Face directories: one file or several, safetensors or .bin, names with and without their prefix."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import read_json
from accessory.errors import CheckpointError


def refusal(path: str | Path) -> str:
    """What `open_source` says against `path`."""
    with pytest.raises(CheckpointError) as caught:
        open_source(path)
    return str(caught.value)


def test_tied_head_is_no_tensor(tiny_base: Path, copy) -> None:
    """A head that some files hold beside the embedding it is tied to would have no place in the model."""
    directory = copy(tiny_base)
    config = read_json(directory / "config.json") | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    assert "output.weight" not in open_source(directory).tensors


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
    assert f"{directory}: model.safetensors or pytorch_model.bin is missing; found config.json" in refusal(directory)


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
    ({"model_type": "bert"}, "model_type 'bert' is not supported. Known: llama, mistral, qwen2"),
    ({"hidden_size": None}, "'hidden_size' is missing"),
    ({"hidden_size": "wide"}, "'dim' is 'wide'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope scaling 'yarn' is not supported"),
])  # fmt: skip
def test_settings_that_cannot_be_used(tiny_base: Path, copy, change: dict, expected: str) -> None:
    """Another architecture, values of a wrong kind."""
    directory = copy(tiny_base)
    (directory / "config.json").write_text(json.dumps(read_json(directory / "config.json") | change))
    message = refusal(directory)
    assert str(directory) in message and expected in message


def test_settings_that_are_missing(tiny_base: Path, copy) -> None:
    """A config.json that does not say how wide the model is."""
    directory = copy(tiny_base)
    config = read_json(directory / "config.json")
    del config["hidden_size"]
    (directory / "config.json").write_text(json.dumps(config))
    assert f"{directory / 'config.json'}: 'hidden_size' is missing" in refusal(directory)


@pytest.fixture
def bins(tiny_base: Path, copy) -> Callable[..., Path]:
    """Number of files -> the tiny model as torch.save's files, as before safetensors."""

    def write(count: int, state: dict[str, object] | None = None, legacy: bool = False) -> Path:
        directory = copy(tiny_base)
        state = state or load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        several = [f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin" for i in range(count)]
        names = several if count > 1 else ["pytorch_model.bin"]
        for i, name in enumerate(names):
            part = {key: state[key] for key in sorted(state)[i::count]}
            torch.save(part, directory / name, _use_new_zipfile_serialization=not legacy)
        if count > 1:
            where = {key: names[i % count] for i, key in enumerate(sorted(state))}
            (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
        return directory

    return write


@pytest.mark.parametrize(("count", "legacy"), [(1, False), (3, False), (1, True)])
def test_bin_files(tiny_base: Path, bins, count: int, legacy: bool) -> None:
    """One and several, and torch's format of before 1.6: the very same tensors, whole and by ranges."""
    expected, source = open_source(tiny_base), open_source(bins(count, legacy=legacy))
    assert len(source.files) == count and source.settings == expected.settings
    assert source.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(source.tensors[name].read(), tensor.read())
    name = "layers.1.feed_forward.w2.weight"
    for dim in (0, 1):
        assert torch.equal(source.tensors[name].read(dim, 32, 96), expected.tensors[name].read(dim, 32, 96))


def test_a_missing_bin_file(bins) -> None:
    """Named."""
    directory = bins(3)
    (directory / "pytorch_model-00002-of-00003.bin").unlink()
    assert refusal(directory).startswith(f"{directory}: pytorch_model-00002-of-00003.bin is missing; found config.json")


def test_safetensors_are_taken_where_there_are_both(tiny_base: Path, bins) -> None:
    """As in many published directories; the .bin is not looked at."""
    directory = bins(1)
    shutil.copy(tiny_base / "model.safetensors", directory)
    (directory / "pytorch_model.bin").write_text("nothing")
    assert [file.name for file in open_source(directory).files] == ["model.safetensors"]


class Bomb:
    """Unpickling this runs a command."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize(("count", "guilty"), [(1, "pytorch_model.bin"), (2, "pytorch_model-00002-of-00002.bin")])
def test_code_inside_is_never_run(bins, tmp_path: Path, count: int, guilty: str) -> None:
    """The file is named, and the canary does not sing; PyTorch's own unsafe way would have let it."""
    canary = tmp_path / "canary"
    directory = bins(count, state={"model.norm.weight": torch.ones(2), "x": Bomb(canary)})
    assert f"{directory / guilty}: cannot be read as a PyTorch checkpoint of plain tensors" in refusal(directory)
    assert not canary.exists()
    torch.load(directory / guilty, weights_only=False)
    assert canary.exists()


def saved(model: transformers.PreTrainedModel, directory: Path, rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Save a model with its tensors renamed; returns them by their full names."""
    model.save_pretrained(directory)
    state = load_file(directory / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in state.items()}, directory / "model.safetensors")
    return state


SMALL = {"vocab_size": 96, "hidden_size": 64}


@pytest.mark.parametrize(("config", "prefix"), [
    (transformers.OPTConfig(**SMALL, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96, word_embed_proj_dim=64,
                            max_position_embeddings=32), "model."),
    (transformers.BloomConfig(**SMALL, n_layer=2, n_head=4), "transformer."),
], ids=["opt", "bloom"])  # fmt: skip
def test_names_without_their_prefix(tmp_path: Path, config: transformers.PretrainedConfig, prefix: str) -> None:
    """As the published OPT (decoder.) and BLOOM (h.0.) have them: the same tensors as with it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, rename in (("full", str), ("bare", lambda key: key.removeprefix(prefix))):
        state = saved(model, tmp_path / name, rename)
    assert all(name.startswith(prefix) for name in state)
    full, bare = (open_source(tmp_path / name).tensors for name in ("full", "bare"))
    assert full.keys() == bare.keys() and "layers.1.attention.wk.bias" in bare
    assert all(torch.equal(bare[name].read(), tensor.read()) for name, tensor in full.items())


def test_fused_matrix_of_another_size(tmp_path: Path) -> None:
    """Complained about by its name there, before it is taken apart."""
    saved(transformers.BloomForCausalLM(transformers.BloomConfig(**SMALL, n_layer=1, n_head=4)), tmp_path, str)
    state = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.0.self_attention.query_key_value.weight"
    save_file(state | {name: state[name][:-3].contiguous()}, tmp_path / "model.safetensors")
    assert f"{tmp_path}: {name} has shape (189, 64); its settings ask for 192 rows." in refusal(tmp_path)
