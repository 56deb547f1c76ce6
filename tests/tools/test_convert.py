"""tools/convert.py as a process: any checkpoint in, our directory out."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
import transformers

from accessory.meta import MetaModel

TOKENS = (torch.arange(40) * 7) % 500


@pytest.fixture
def tiny_gguf(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny model as llama.cpp's converter writes it: its own names, wq and wk permuted, no vocabulary."""
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(128)
    writer.add_block_count(2)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:  # convert_hf_to_gguf.py, LlamaModel.permute
            weight = weight.reshape(heads, 2, weight.shape[0] // heads // 2, 128).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def test_gguf_to_ours(python, tiny_base: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    """The written directory needs nothing else, and gives the same logits as the Hugging Face original, bit for bit."""
    done = python("tools/convert.py", tiny_gguf, tmp_path / "ours", "--dtype", "fp32", "--tokenizer_path", tiny_base)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"GGUF {tiny_gguf} -> {tmp_path / 'ours'} (32 bits, 21 tensors)\n"
    found = MetaModel.from_pretrained(tmp_path / "ours", dtype="fp32").logits(TOKENS, (40,))
    assert torch.equal(found, MetaModel.from_pretrained(tiny_base, dtype="fp32").logits(TOKENS, (40,)))


def test_part_of_a_model_is_refused(python, tiny_base: Path, tmp_path: Path) -> None:
    """In a sentence, with status 1, and before anything is written: what could not be loaded later helps nobody."""
    settings = tmp_path / "settings.json"
    settings.write_text('{"n_layers": 3}')
    done = python("tools/convert.py", tiny_base, tmp_path / "ours", "--llama_config", settings)
    assert done.returncode == 1
    assert f"{tiny_base}: layers.2.attention.wq.weight, " in done.stderr and "are missing." in done.stderr
    assert done.stderr.startswith("CheckpointError: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "ours").exists()
