"""Opening whatever a user gives: the format is recognised from the files, and what is not a checkpoint is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import model_args_of
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
    assert source.llama_type == (None if format_name.startswith(("meta", "llama3", "upstream")) else "llama")


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
    assert str(tmp_path / "model.gguf") in message and what in message and "expected a GGUF file" in message
    message = refusal(tmp_path / "ours")
    assert str(tmp_path / "ours" / "model.safetensors") in message and what in message and "as safetensors" in message
    message = refusal(tmp_path / "hf")
    assert str(tmp_path / "hf" / "config.json") in message and what in message and "a JSON object" in message
