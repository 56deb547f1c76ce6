"""Names of every family: checked against those that transformers and gguf themselves use, and the decoder's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from accessory.checkpoint.load import targets
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import model_args_of
from accessory.model.decoder import Decoder
from accessory.model.families import ARCHITECTURES
from tests.model.families.matrix import CASES

GGUF = {
    "llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gptneox": gguf.MODEL_ARCH.GPTNEOX, "bloom": gguf.MODEL_ARCH.BLOOM, "chatglm": gguf.MODEL_ARCH.CHATGLM,
    "glm4": gguf.MODEL_ARCH.GLM4, "internlm2": gguf.MODEL_ARCH.INTERNLM2, "baichuan": gguf.MODEL_ARCH.BAICHUAN,
}  # fmt: skip


def file_names(name: str, checkpoints) -> list[str]:
    """Names in a case's file."""
    with safe_open(checkpoints[0] / name / "model.safetensors", framework="pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_has_its_place(name: str, checkpoints) -> None:
    """Names and shapes are exactly those the decoder wants, biases included; our places lead back to their names."""
    source = open_source(checkpoints[0] / name)
    args = model_args_of(source)
    wanted = {target.name: target.local_shape for target in targets(Decoder(args, dtype=torch.float32))}
    assert {key: tensor.shape for key, tensor in source.tensors.items()} == wanted
    names = ARCHITECTURES[args.architecture].names
    back = {f"{names.theirs(ours.rpartition('.')[0])[0]}.{ours.rpartition('.')[2]}" for ours in wanted}
    assert back == {key for key in file_names(name, checkpoints) if not names.is_needless(key)}


def test_head_of_neox_by_either_name(checkpoints, tmp_path: Path) -> None:
    """Some files call it lm_head; it is the same matrix, and embed_out is what is written."""
    directory = checkpoints[0] / "neox"
    state = load_file(directory / "model.safetensors")
    state["lm_head.weight"] = state.pop("embed_out.weight")
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(directory / "config.json", tmp_path)
    assert torch.equal(open_source(tmp_path).tensors["output.weight"].read(), state["lm_head.weight"])
    assert ARCHITECTURES["gpt_neox"].names.theirs("output") == ("embed_out", "output")


# The package knows no names of ChatGLM's own code.
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if ARCHITECTURES[case.model_type].gguf and name != "chatglm"]
)
def test_gguf_names_are_the_gguf_packages(name: str, checkpoints) -> None:
    """For each tensor, the package's own name leads to the same place as Hugging Face's."""
    architecture = ARCHITECTURES[CASES[name].model_type]
    table = gguf.get_tensor_name_map(GGUF[architecture.gguf.architecture], 2)
    met = 0
    for key in file_names(name, checkpoints):
        found = architecture.names.ours(key)
        theirs = table.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None or not isinstance(found[0], str) or theirs is None:
            continue
        assert architecture.gguf.names.ours(theirs) == found, key
        met += 1
    assert met >= 10


def test_tables_are_left_and_strangers_kept() -> None:
    """What carries nothing is told by name; what is not known has no place."""
    names = ARCHITECTURES["llama"].names
    assert names.is_needless("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not names.is_needless("model.layers.0.self_attn.q_proj.weight")
    assert ARCHITECTURES["gpt_neox"].names.is_needless("gpt_neox.layers.0.attention.masked_bias")
    assert ARCHITECTURES["gpt_neox"].names.is_needless("gpt_neox.layers.0.attention.bias")
    assert not ARCHITECTURES["gpt_neox"].names.is_needless("gpt_neox.layers.0.attention.dense.bias")
    assert ARCHITECTURES["llama"].gguf.names.is_needless("rope_freqs.weight")
    for stranger in (
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.x.mlp.up_proj.weight",
        "layers.0.mlp.weight",
    ):
        assert names.ours(stranger) is None
    assert names.theirs("layers.0.attention.q_norm") is None
    assert ARCHITECTURES["qwen3"].names.ours("model.layers.0.self_attn.q_norm.weight") == (
        "layers.0.attention.q_norm", "weight",
    )  # fmt: skip


def test_blocks_are_told_apart() -> None:
    """Numbers of blocks are numbers: 1 and 11 are two."""
    names = ARCHITECTURES["opt"].names
    for block in (1, 11, 110):
        for prefix in ("model.decoder", "decoder"):
            found = names.ours(f"{prefix}.layers.{block}.final_layer_norm.bias")
            assert found == (f"layers.{block}.ffn_norm", "bias")
    assert names.ours("decoder.final_layer_norm.bias") == ("norm", "bias")
    assert names.ours("lm_head.weight") == ("output", "weight")
