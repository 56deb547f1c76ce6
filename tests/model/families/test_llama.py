"""LLaMA's other names: checked against the names that transformers and gguf themselves use."""

from __future__ import annotations

import gguf
import pytest
import torch
import transformers

from accessory.checkpoint.load import targets
from accessory.errors import CheckpointError
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.families import llama

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True,
}  # fmt: skip


def hf_names(**changes) -> dict[str, torch.Size]:
    """Names and shapes of a transformers LLaMA."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes}))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def hf_config(**changes) -> dict:
    """What transformers writes to config.json."""
    return transformers.LlamaConfig(**{**SIZES, **changes}).to_dict()


def test_every_hugging_face_tensor_has_its_place() -> None:
    """Translated names and shapes are exactly those the decoder wants, biases included."""
    decoder = Decoder(llama.args_from_hf(hf_config(), "here"), dtype=torch.float32)
    wanted = {target.name: target.local_shape for target in targets(decoder)}
    assert {llama.from_hf_name(name): tuple(shape) for name, shape in hf_names().items()} == wanted


def test_gguf_names_are_the_gguf_packages() -> None:
    """For each tensor, the package's own name leads to the same place as Hugging Face's."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name in hf_names():
        theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert llama.from_gguf_name(theirs) == llama.from_hf_name(name), name


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("llma.layers.3.attention.wq.lora_a.weight", "layers.3.attention.wq.lora_a.weight"),
        ("layers.3.feed_forward.w2.weight", "layers.3.feed_forward.w2.weight"),
        ("rope.freqs", None),
    ],
)
def test_upstream_names(name: str, ours: str | None) -> None:
    """LLaMA2-Accessory's prefix goes, and tables that can be computed are left."""
    assert llama.from_upstream_name(name) == ours


def test_tables_are_left_and_strangers_kept() -> None:
    """What carries nothing gives no name; what is not known keeps its own, to be complained about."""
    assert llama.from_hf_name("model.layers.0.self_attn.rotary_emb.inv_freq") is None
    assert llama.from_gguf_name("rope_freqs.weight") is None
    assert llama.from_hf_name("model.layers.0.self_attn.q_norm.weight") == "model.layers.0.self_attn.q_norm.weight"


def test_heads_whose_rows_are_permuted() -> None:
    """wq by query heads, wk by key/value heads, weights and biases; nothing else."""
    args = ModelArgs(dim=64, n_heads=4, n_kv_heads=2)
    found = {leaf: llama.interleaved_heads(f"layers.0.{leaf}", args) for leaf in (
        "attention.wq.weight", "attention.wq.bias", "attention.wk.weight", "attention.wv.weight",
        "attention.wo.weight", "attention_norm.weight", "feed_forward.w1.weight")}  # fmt: skip
    assert list(found.values()) == [4, 4, 2, None, None, None, None]


def test_settings_of_a_config() -> None:
    """Every field of a config.json written by transformers."""
    config = hf_config(
        head_dim=24, rms_norm_eps=1e-4, max_position_embeddings=512, tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0},
    )  # fmt: skip
    args = llama.args_from_hf(config, "here")
    wanted = ModelArgs(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=24, vocab_size=96, hidden_dim=160, norm_eps=1e-4,
        rope_theta=777.0, rope_scaling=0.5, qkv_bias=True, out_bias=True, mlp_bias=True, tie_word_embeddings=True,
        max_seq_len=512,
    )  # fmt: skip
    assert args == wanted


def test_settings_of_an_older_config() -> None:
    """Before transformers 5: rope_theta and rope_scaling at the top, no head_dim, no key/value heads."""
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
        "intermediate_size": 160, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0},
    }  # fmt: skip
    args = llama.args_from_hf(config, "here")
    assert (args.n_kv_heads, args.head_dim, args.rope_theta) == (4, 16, 5e5)
    assert (args.rope_scaling.kind, args.rope_scaling.factor) == ("linear", 4.0)
    assert llama.args_from_hf({**config, "rope_scaling": None}, "here").rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; known: llama, mistral"),
        ({"sliding_window": 128, "max_position_embeddings": 512}, "sliding_window 128 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; expected 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' is not supported"),
    ],
)
def test_what_is_not_done_is_refused(changes: dict, message: str) -> None:
    """With the file, what was found and what is known."""
    with pytest.raises(CheckpointError, match=f"here/config.json: {message}"):
        llama.args_from_hf({**hf_config(), **changes}, "here/config.json")


def test_a_window_wider_than_the_model_is_no_window() -> None:
    """Mistral's later files state one."""
    config = {**hf_config(), "model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 4096}
    assert llama.args_from_hf(config, "here").max_seq_len == 4096


def test_settings_of_a_gguf() -> None:
    """From metadata; a file without a head has it tied; another architecture or rope factors are refused."""
    fields = {
        "general.architecture": "llama", "llama.embedding_length": 64, "llama.block_count": 2,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.feed_forward_length": 160,
        "llama.attention.layer_norm_rms_epsilon": 1e-6, "llama.rope.freq_base": 5e5, "llama.context_length": 512,
        "llama.vocab_size": 96,
    }  # fmt: skip
    args = llama.args_from_gguf(fields, {"token_embd.weight", "output.weight"}, "here.gguf")
    wanted = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, hidden_dim=160, norm_eps=1e-6,
                       rope_theta=5e5, max_seq_len=512)  # fmt: skip
    assert args == wanted
    assert llama.args_from_gguf(fields, {"token_embd.weight"}, "here.gguf").tie_word_embeddings
    with pytest.raises(CheckpointError, match=r"here\.gguf: architecture 'bloom' is not supported; known: llama"):
        llama.args_from_gguf({**fields, "general.architecture": "bloom"}, set(), "here.gguf")
    with pytest.raises(CheckpointError, match="carries Llama 3 rope factors"):
        llama.args_from_gguf(fields, {"rope_freqs.weight"}, "here.gguf")
