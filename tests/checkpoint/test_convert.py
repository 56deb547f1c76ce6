"""Writing a base as our own directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from accessory.checkpoint import save
from accessory.checkpoint.convert import write_base
from accessory.checkpoint.source import model_args_of, open_source
from accessory.errors import CheckpointError
from accessory.tokenizer import Tokenizer, open_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    """The tiny model's."""
    return open_tokenizer(tiny_base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format(
    formats: dict[str, Path], weights, tokenizer: Tokenizer, tmp_path: Path, format_name: str, dtype: torch.dtype
) -> None:
    """The written directory has the same tensors in the dtype asked for, settings, tokenizer, and nothing to spare."""
    source = open_source(formats[format_name])
    write_base(source, model_args_of(source).model_dump(), tokenizer, tmp_path / "new", dtype)
    found = open_source(tmp_path / "new")
    assert (found.format, found.llama_type, found.is_delta) == ("Accessory", "llama", False)
    assert model_args_of(found) == model_args_of(source)
    assert found.tensors.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found.tensors[name].read(), weight.to(dtype)), name
    size = sum(path.stat().st_size for path in (tmp_path / "new").glob("*.safetensors"))
    assert size < sum(weight.numel() for weight in weights.values()) * dtype.itemsize + 8192
    assert open_tokenizer(tmp_path / "new").fingerprint == tokenizer.fingerprint


def test_tensors_of_one_memory(tokenizer: Tokenizer, tmp_path: Path, weights) -> None:
    """A .pth whose head is the embedding's own memory is written as two tensors, which safetensors insists on."""
    tied = weights | {"output.weight": weights["tok_embeddings.weight"]}
    torch.save(tied, tmp_path / "consolidated.00.pth")
    write_base(open_source(tmp_path), {"dim": 128}, tokenizer, tmp_path / "new", torch.float32)
    found = open_source(tmp_path / "new").tensors
    assert all(torch.equal(found[name].read(), weight) for name, weight in tied.items())


def test_large_model_in_shards(
    formats: dict[str, Path], weights, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read back from several files."""
    monkeypatch.setattr(save, "SHARD_BYTES", 200_000)
    write_base(open_source(formats["meta2"]), {}, tokenizer, tmp_path / "new", torch.float32)
    found = open_source(tmp_path / "new")
    assert len(found.files) > 4
    assert all(torch.equal(found.tensors[name].read(), weight) for name, weight in weights.items())


def test_nothing_is_replaced(formats: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path, copy) -> None:
    """A directory with anything in it, the source itself and a file are refused and left as they are."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    source = open_source(copy(formats["ours"]))
    for target in (tmp_path / "thesis", source.path, tmp_path / "thesis" / "chapter1.txt"):
        with pytest.raises(CheckpointError, match=f"{target}: found a.*expected a new or empty directory"):
            write_base(source, {}, tokenizer, target, torch.float32)
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"
    assert open_source(source.path).tensors.keys() == source.tensors.keys()
    (tmp_path / "empty").mkdir()
    write_base(source, {}, tokenizer, tmp_path / "empty", torch.float32)
    assert json.loads((tmp_path / "empty" / "meta.json").read_text()) == {"llama_type": "llama"}
