"""What is said of a checkpoint, line by line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from accessory.checkpoint.describe import describe
from accessory.checkpoint.merge import repacked
from accessory.checkpoint.opening import open_source
from accessory.export import Destination, open_whole
from accessory.quant import storage
from tests.checkpoint.trained import write_trained


def lines(path: Path, **options: bool) -> dict[str, str]:
    """What is said, by the name that it stands behind."""
    text = describe(open_source(path), **options).splitlines()
    return {name: value.strip() for name, _, value in (line.partition("  ") for line in text)}


def test_hugging_face(tiny_base: Path) -> None:
    """Format, family, size, types; settings that are not the default, and no other."""
    found = lines(tiny_base)
    size = (tiny_base / "model.safetensors").stat().st_size
    assert found == {
        "path": str(tiny_base), "format": "Hugging Face", "files": f"1 ({size / 1e9:.3f} GB)", "tensors": "21",
        "parameters": f"{expected_parameters():,}", "types": "F32 x 21", "quantization": "none", "llama_type": "llama",
        "family": "llama (llama)",
        "settings": "dim 128, n_layers 2, n_heads 4, n_kv_heads 2, head_dim 32, vocab_size 512, embedding_dim 128, "
        "hidden_dim 256, rotary_layout halves, rotary_dim 32, max_seq_len 512",
    }  # fmt: skip


def expected_parameters() -> int:
    """Counted by hand from the shapes of the tiny model."""
    block = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128 + 2 * 128
    return 2 * block + 2 * 512 * 128 + 128


@pytest.mark.parametrize("quant_type", ["nf4", "fp4_single"])
def test_packed(tiny_base: Path, tmp_path: Path, quant_type: str) -> None:
    """The storage format is named; parameters are counted as weights, not as bytes."""
    model, _, _ = open_whole([tiny_base])
    Destination(dtype="bf16", quant_type=quant_type).write(model, tmp_path / "packed")
    found = lines(tmp_path / "packed")
    assert found["format"] == "Accessory (packed)"
    assert found["quantization"] == quant_type
    assert found["types"] == f"{quant_type} x 14, BF16 x 7"
    assert found["parameters"] == f"{expected_parameters():,}"


def test_packed_in_two_formats(tiny_base: Path, tmp_path: Path) -> None:
    """As a mix is: both are named, that of most matrices first, although the first matrix has the other."""
    model, _, _ = open_whole([tiny_base])
    wide = {f"layers.{index}.attention.wq": storage("int4_g128") for index in range(2)}
    packed = repacked(model.tensors, "int2_g64", storages=wide)
    Destination(dtype="bf16").write(replace(model, tensors=packed), tmp_path / "packed")
    assert lines(tmp_path / "packed")["quantization"] == "int2_g64, int4_g128"


def test_trained_part(tiny_base: Path, tmp_path: Path) -> None:
    """Its method, its base, and what that was kept in."""
    found = lines(write_trained(tiny_base, tmp_path / "part", "nf4"))
    assert found["format"] == "Accessory (trained part)"
    assert found["llama_type"] == "llama_peft"
    assert found["quantization"] == "its base was trained on as nf4"
    assert found["trained on"] == f"{tiny_base} (Hugging Face)"
    assert "lora_rank 4, lora_alpha 6.0" in found["method"]
    assert found["types"] == "F32 x 47"  # 14 linears of bias and two factors, 5 norms


def test_gguf(formats: dict[str, Path]) -> None:
    """Its types are llama.cpp's."""
    found = lines(formats["gguf"])
    assert (found["format"], found["family"]) == ("GGUF", "llama (llama)")
    assert found["types"] == "F32 x 21" and found["tensors"] == "21"


def test_every_tensor(tiny_base: Path) -> None:
    """By our names, with type and shape."""
    text = describe(open_source(tiny_base), every_tensor=True).splitlines()
    assert "layers.1.attention.wk.weight  F32  [64, 128]" in text
    assert len(text) == 10 + 21
    assert len(describe(open_source(tiny_base)).splitlines()) == 10
