"""tools/convert.py as a process, and within this one: any checkpoint in, any format out."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
import transformers

from accessory.checkpoint.opening import open_source
from accessory.meta import MetaModel
from tests.checkpoint.trained import write_trained, write_trained_side

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
    """The written directory needs nothing else, and gives the logits of the Hugging Face original."""
    done = python("tools/convert.py", tiny_gguf, tmp_path / "ours", "--dtype", "fp32", "--tokenizer_path", tiny_base)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{tiny_gguf} -> {tmp_path / 'ours'} (accessory)\n"
    found = MetaModel.from_pretrained(tmp_path / "ours", dtype="fp32").logits(TOKENS, (40,))
    expected = MetaModel.from_pretrained(tiny_base, dtype="fp32").logits(TOKENS, (40,))
    assert (found - expected).abs().max() < 2e-5


def test_every_flag_arrives(called, tiny_base: Path, tmp_path: Path) -> None:
    """Format, shards, type, and settings laid over the source's own."""
    settings = tmp_path / "settings.json"
    settings.write_text('{"rope_theta": 5e5}')
    arguments = ("--to", "upstream", "--model_parallel_size", "2", "--dtype", "fp16", "--llama_config", settings)
    done = called("tools/convert.py", tiny_base, tmp_path / "out", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{tiny_base} -> {tmp_path / 'out'} (upstream)\n"
    source = open_source(tmp_path / "out")
    assert [file.name for file in source.files] == [f"consolidated.{i:02d}-of-02.model.pth" for i in range(2)]
    assert source.settings["rope_theta"] == 5e5
    assert source.tensors["norm.weight"].dtype == "float16"


def test_trained_part_for_peft(called, tiny_base: Path, tmp_path: Path) -> None:
    """--to peft writes an adapter, which has no place for biases."""
    part = write_trained(tiny_base, tmp_path / "part", norm_tuning=False)
    done = called("tools/convert.py", part, tmp_path / "adapter", "--to", "peft", "--drop_biases")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{part} -> {tmp_path / 'adapter'} (peft)\n"
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_several_sources(called, tiny_base: Path, tmp_path: Path) -> None:
    """Base and parts as for --pretrained_path, the target last; what peft's users load may be named."""
    norms = write_trained(tiny_base, tmp_path / "norms", bias_tuning=False)
    part = write_trained(tiny_base, tmp_path / "part", norm_tuning=False, bias_tuning=False)
    arguments = ("--to", "peft", "--base_model", "me/base")
    done = called("tools/convert.py", tiny_base, norms, part, tmp_path / "adapter", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{tiny_base} + {norms} + {part} -> {tmp_path / 'adapter'} (peft)\n"
    assert '"me/base"' in (tmp_path / "adapter" / "adapter_config.json").read_text()
    done = called("tools/convert.py", tiny_base, tmp_path / "out", "--base_model", "me/base")
    assert done.stderr == "ConfigError: --base_model goes with --to peft.\n"


def test_side_network_for_the_published_code(called, tiny_base: Path, tmp_path: Path) -> None:
    """--to qst writes its files, and says which model they go into."""
    part = write_trained_side(tiny_base, tmp_path / "part", r=4, start="released")
    done = called("tools/convert.py", part, tmp_path / "qst", "--to", "qst")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second, _ = done.stdout.split("\n")
    assert first == f"{part} -> {tmp_path / 'qst'} (qst)"
    assert second.startswith(f"the published code loads it into a model made beside {tiny_base} with QSTConfig(r=4, ")
    assert len(list((tmp_path / "qst").glob("*.pt"))) == 6


def test_part_of_a_model_is_refused(python, tiny_base: Path, tmp_path: Path) -> None:
    """In a sentence, with status 1, and before anything is written: what could not be loaded later helps nobody."""
    settings = tmp_path / "settings.json"
    settings.write_text('{"n_layers": 3}')
    done = python("tools/convert.py", tiny_base, tmp_path / "ours", "--llama_config", settings)
    assert done.returncode == 1
    assert done.stderr == f"CheckpointError: {tiny_base}: its settings say 3 blocks, its files hold 2.\n"
    assert not (tmp_path / "ours").exists()


def test_unknown_flag_stops_it(called, tiny_base: Path, tmp_path: Path) -> None:
    """Before it has done without: a mistyped flag is no default."""
    done = called("tools/convert.py", tiny_base, tmp_path / "ours", "--dtpye", "fp32")
    assert done.returncode == 1
    assert done.stderr == "ConfigError: Unknown flag --dtpye. Did you mean '--dtype'?\n"
    assert not (tmp_path / "ours").exists()
