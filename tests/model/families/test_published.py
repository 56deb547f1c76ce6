"""The config.json files that were published, in their own and older spellings, by hand-computed settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from accessory.errors import CheckpointError
from accessory.model.args import RopeScaling
from accessory.model.families import ARCHITECTURES, architecture_of

LINEAR_BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
NO_BIASES = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
OPT = {
    "model_type": "opt", "_remove_final_layer_norm": False, "activation_function": "relu", "attention_dropout": 0.0,
    "max_position_embeddings": 2048, "vocab_size": 50272, "prefix": "</s>",
}  # fmt: skip
PUBLISHED = {
    "facebook/opt-125m": (
        OPT | {"do_layer_norm_before": True, "ffn_dim": 3072, "hidden_size": 768, "num_attention_heads": 12,
               "num_hidden_layers": 12, "word_embed_proj_dim": 768},
        {"dim": 768, "embedding_dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "head_dim": 64,
         "hidden_dim": 3072, "vocab_size": 50272, "norm": "layer", "norm_eps": 1e-5, "norm_placement": "before",
         "final_norm": True, "position": "learned", "position_offset": 2, "max_seq_len": 2048, "activation": "relu",
         "gated": False, "tie_word_embeddings": True, "longest_document": 2048} | LINEAR_BIASES,
    ),
    "facebook/opt-350m": (
        OPT | {"do_layer_norm_before": False, "ffn_dim": 4096, "hidden_size": 1024, "num_attention_heads": 16,
               "num_hidden_layers": 24, "word_embed_proj_dim": 512},
        {"dim": 1024, "embedding_dim": 512, "n_layers": 24, "head_dim": 64, "hidden_dim": 4096,
         "norm_placement": "after", "final_norm": False, "tie_word_embeddings": True} | LINEAR_BIASES,
    ),
    "bigscience/bloom-560m": (
        {"model_type": "bloom", "apply_residual_connection_post_layernorm": False, "layer_norm_epsilon": 1e-5,
         "n_embed": 1024, "n_inner": None, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100,
         "pretraining_tp": 1, "seq_length": 2048, "skip_bias_add": True, "vocab_size": 250880},
        {"dim": 1024, "n_layers": 24, "n_heads": 16, "n_kv_heads": 16, "head_dim": 64, "hidden_dim": 4096,
         "vocab_size": 250880, "norm": "layer", "norm_eps": 1e-5, "embedding_norm": True, "position": "alibi",
         "activation": "gelu_tanh", "gated": False, "tie_word_embeddings": True, "max_seq_len": 2048,
         "longest_document": 65536} | LINEAR_BIASES,
    ),
    "EleutherAI/pythia-160m": (
        {"model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072,
         "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "num_attention_heads": 12, "num_hidden_layers": 12,
         "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "use_parallel_residual": True,
         "vocab_size": 50304},
        {"dim": 768, "n_layers": 12, "n_heads": 12, "head_dim": 64, "hidden_dim": 3072, "vocab_size": 50304,
         "rotary_dim": 16, "rope_theta": 10000.0, "parallel_residual": True, "activation": "gelu", "norm": "layer",
         "gated": False, "tie_word_embeddings": False, "rotary_layout": "halves", "max_seq_len": 2048} | LINEAR_BIASES,
    ),
    "mistralai/Mistral-7B-v0.1": (
        {"model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
         "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
         "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096,
         "tie_word_embeddings": False, "vocab_size": 32000},
        {"dim": 4096, "n_layers": 32, "n_kv_heads": 8, "head_dim": 128, "hidden_dim": 14336, "sliding_window": 4096,
         "windows": {4096}, "norm_eps": 1e-5, "max_seq_len": 32768, "longest_document": None} | NO_BIASES,
    ),
    "mistralai/Mistral-7B-v0.3": (
        {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
         "sliding_window": None, "vocab_size": 32768, "max_position_embeddings": 32768},
        {"rope_theta": 1e6, "sliding_window": None, "windows": {None}},
    ),
    "Qwen/Qwen2.5-0.5B": (
        {"model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
         "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14,
         "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
         "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False,
         "vocab_size": 151936},
        {"dim": 896, "n_layers": 24, "n_heads": 14, "n_kv_heads": 2, "head_dim": 64, "hidden_dim": 4864,
         "rope_theta": 1e6, "tie_word_embeddings": True, "qkv_bias": True, "out_bias": False, "mlp_bias": False,
         "sliding_window": None, "windows": {None}, "qk_norm": False, "rotary_layout": "halves"},
    ),
    "Qwen/Qwen3-0.6B": (
        {"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
         "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
         "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
         "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
         "use_sliding_window": False, "vocab_size": 151936},
        {"dim": 1024, "n_heads": 16, "head_dim": 128, "rotary_dim": 128, "n_kv_heads": 8, "qk_norm": True,
         "rope_theta": 1e6, "rope_scaling": None, "max_seq_len": 40960, "windows": {None}} | NO_BIASES,
    ),
    "THUDM/chatglm3-6b": (
        {"model_type": "chatglm", "add_bias_linear": False, "add_qkv_bias": True,
         "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
         "attention_softmax_in_fp32": True, "ffn_hidden_size": 13696, "hidden_size": 4096, "kv_channels": 128,
         "layernorm_epsilon": 1e-5, "multi_query_attention": True, "multi_query_group_num": 2,
         "num_attention_heads": 32, "num_layers": 28, "original_rope": True, "padded_vocab_size": 65024,
         "post_layer_norm": True, "rmsnorm": True, "seq_length": 8192, "tie_word_embeddings": False},
        {"dim": 4096, "n_layers": 28, "n_heads": 32, "n_kv_heads": 2, "head_dim": 128, "rotary_dim": 64,
         "rotary_layout": "pairs", "rope_theta": 10000.0, "hidden_dim": 13696, "vocab_size": 65024, "norm_eps": 1e-5,
         "qkv_bias": True, "out_bias": False, "mlp_bias": False, "gated": True, "activation": "silu",
         "max_seq_len": 8192, "tie_word_embeddings": False},
    ),
    "baichuan-inc/Baichuan-7B": (
        {"model_type": "baichuan", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
         "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "rms_norm_eps": 1e-6,
         "tie_word_embeddings": False, "vocab_size": 64000},
        {"position": "rotary", "dim": 4096, "hidden_dim": 11008, "n_kv_heads": 32, "head_dim": 128,
         "vocab_size": 64000, "max_seq_len": 4096, "rope_theta": 10000.0, "norm_eps": 1e-6} | NO_BIASES,
    ),
    "baichuan-inc/Baichuan-13B-Base": (
        {"model_type": "baichuan", "_from_model_config": True, "hidden_act": "silu", "hidden_size": 5120,
         "intermediate_size": 13696, "model_max_length": 4096, "num_attention_heads": 40, "num_hidden_layers": 40,
         "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "vocab_size": 64000},
        {"position": "alibi", "dim": 5120, "n_heads": 40, "n_kv_heads": 40, "head_dim": 128, "hidden_dim": 13696,
         "max_seq_len": 4096, "longest_document": 65536} | NO_BIASES,
    ),
    "internlm/internlm-7b": (
        {"model_type": "internlm", "bias": True, "hidden_act": "silu", "hidden_size": 4096,
         "intermediate_size": 11008, "max_position_embeddings": 2048, "num_attention_heads": 32,
         "num_hidden_layers": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "vocab_size": 103168},
        {"qkv_bias": True, "out_bias": True, "mlp_bias": False, "vocab_size": 103168, "hidden_dim": 11008,
         "max_seq_len": 2048, "rotary_layout": "halves"},
    ),
    "internlm/internlm-chat-7b-v1_1": (
        {"model_type": "internlm", "attn_implementation": "eager", "bias": True, "hidden_act": "silu",
         "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 2048, "num_attention_heads": 32,
         "num_hidden_layers": 32, "rms_norm_eps": 1e-6, "rotary": {"base": 10000, "type": "dynamic"},
         "tie_word_embeddings": False, "vocab_size": 103168},
        {"rope_theta": 10000.0, "rope_scaling": RopeScaling(kind="dynamic", factor=1.0), "longest_document": 2048},
    ),
    "internlm/internlm2-7b": (
        {"model_type": "internlm2", "attn_implementation": "eager", "bias": False, "hidden_act": "silu",
         "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
         "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
         "rope_scaling": {"factor": 2.0, "type": "dynamic"}, "rope_theta": 1000000, "tie_word_embeddings": False,
         "vocab_size": 92544},
        {"n_kv_heads": 8, "rope_theta": 1e6, "rope_scaling": RopeScaling(kind="dynamic", factor=2.0),
         "longest_document": 32768, "norm_eps": 1e-5, "vocab_size": 92544} | NO_BIASES,
    ),
    "meta-llama/Llama-3.1-8B": (
        {"model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
         "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
         "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192, "rope_type": "llama3"},
         "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256},
        {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                     original_max_position_embeddings=8192),
         "rope_theta": 5e5, "n_kv_heads": 8, "head_dim": 128, "hidden_dim": 14336, "max_seq_len": 131072,
         "vocab_size": 128256, "longest_document": None} | NO_BIASES,
    ),
    "meta-llama/Llama-2-7b-hf": (
        {"model_type": "llama", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
         "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
         "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None,
         "tie_word_embeddings": False, "vocab_size": 32000},
        {"rope_theta": 10000.0, "rope_scaling": None, "n_kv_heads": 32, "hidden_dim": 11008, "norm_eps": 1e-5,
         "rotary_dim": 128, "rotary_layout": "halves"} | NO_BIASES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    """Every setting that is told."""
    config, wanted = PUBLISHED[name]
    args = architecture_of(config["model_type"], name).read(config, name)
    found = args.model_dump() | {"rope_scaling": args.rope_scaling, "longest_document": args.longest_document}
    found["windows"] = {args.window(i) for i in range(args.n_layers)}
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize(("model_type", "change", "message"), [
    ("llama", {"hidden_act": "mish"}, "activation 'mish' is not supported; known: silu, swish, gelu"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2}}, "rope scaling 'yarn' is not supported; known: default"),
    ("llama", {"hidden_size": None}, "'hidden_size' is missing; expected the model's settings"),
    ("llama", {"rope_parameters": {"rope_theta": 7e4}}, r"says rope_theta twice, \[70000.0, 500000.0\]; expected one"),
    ("qwen2", {"rope_parameters": {"full_attention": {}}}, "rotary settings of their own for full_attention are not"),
    ("internlm", {"rotary": {"base": 1e4, "type": "yarn"}}, "rotary is {'base': .*; expected a base and a type"),
    ("chatglm", {"position_encoding_2d": True, "inner_hidden_size": 8}, "this is the first ChatGLM-6B, with positions"),
    ("chatglm", {"original_rope": False}, "original_rope False is not supported; expected True"),
    ("chatglm", {"interleaved_qkv": True}, "interleaved_qkv True is not supported; expected False"),
    ("chatglm", {"pre_seq_len": 128}, "pre_seq_len 128 is not supported; expected None"),
    ("chatglm", {"quantization_bit": 4}, "quantization_bit 4 is not supported; expected 0"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm True is"),
    ("opt", {"layer_norm_elementwise_affine": False}, r"norms without weights \(layer_norm_elementwise_affine\)"),
    ("chatglm", {"rmsnorm": False}, "rmsnorm False is not supported; expected True"),
])  # fmt: skip
def test_what_is_not_done_is_refused(model_type: str, change: dict, message: str) -> None:
    """With the file, what was found and what is known."""
    config = next(config for config, _ in PUBLISHED.values() if config["model_type"] == model_type) | change
    with pytest.raises(CheckpointError, match=f"here/config.json: {message}"):
        architecture_of(model_type, "here").read(config, "here/config.json")


@pytest.mark.parametrize(("name", "change", "wanted"), [
    ("internlm/internlm-7b", {"rotary": {"base": 1e6, "type": "origin"}}, {"rope_theta": 1e6, "rope_scaling": None}),
    ("internlm/internlm-7b", {"rotary": {"base": 1e6, "type": "dynamic", "scaling_factor": 4.0}},
     {"rope_theta": 1e6, "rope_scaling": RopeScaling(kind="dynamic", factor=4.0)}),
    ("THUDM/chatglm3-6b", {"rope_ratio": 50}, {"rope_theta": 5e5, "rope_scaling": None}),
    ("THUDM/chatglm3-6b", {"rope_ratio": 4, "_name_or_path": "THUDM/chatglm2-6b-32k"},
     {"rope_theta": 1e4, "rope_scaling": RopeScaling(kind="linear", factor=4.0)}),
])  # fmt: skip
def test_rotary_words_of_their_own(name: str, change: dict, wanted: dict) -> None:
    """A key that means one thing in one model's code and another in the next."""
    config = PUBLISHED[name][0] | change
    args = architecture_of(config["model_type"], name).read(config, name)
    assert {key: getattr(args, key) for key in wanted} == wanted


def test_baichuan_2_is_told_by_its_own_key() -> None:
    """Not by the size of its vocabulary, which added tokens change."""
    baichuan = architecture_of("baichuan", "here")
    for size in (64000, 64003, 125696, 125700):
        one = PUBLISHED["baichuan-inc/Baichuan-7B"][0] | {"vocab_size": size}
        assert baichuan.unit_head_key not in one
        assert baichuan.unit_head_key in one | {"z_loss_weight": 0}
        assert baichuan.read(one | {"z_loss_weight": 0}, "here") == baichuan.read(one, "here")


NEUTRAL = {
    "attention_dropout", "dropout", "hidden_dropout", "classifier_dropout", "layerdrop",  # only LoRA's is ours
    "_attn_implementation", "pretraining_tp", "slow_but_exact", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states",  # the same sums in another way
    "num_labels", "problem_type",  # of classifiers
    "pad_token_id", "is_decoder",  # nothing is padded; every model is a decoder
}  # fmt: skip
"""Keys that transformers' code reads and that change nothing of what we compute."""
ELSEWHERE = {
    "head_dim", "rope_parameters", "sliding_window", "layer_types", "do_layer_norm_before",
    "_remove_final_layer_norm", "layer_norm_elementwise_affine",
}  # fmt: skip
"""Keys that are read by our code, not by a table."""


def test_what_transformers_knows() -> None:
    """All model types but four."""
    foreign = {name for name, architecture in ARCHITECTURES.items() if not architecture.native}
    assert foreign == set(ARCHITECTURES) - set(transformers.models.auto.configuration_auto.CONFIG_MAPPING)
    assert foreign == {"baichuan", "internlm", "internlm2", "chatglm"}


MODELS = Path(transformers.__file__).parent / "models"
SOURCES = {name: files for name in ARCHITECTURES if (files := [*(MODELS / name).glob("modeling_*.py")])}


@pytest.mark.parametrize("name", SOURCES)
def test_no_key_that_transformers_computes_with_is_ignored(name: str) -> None:
    """Every key that the source of its code reads from a config is read here, refused, or known to change nothing."""
    asked = set(re.findall(r"\bconfig(?:\.|, \")([a-z_]+)", "".join(file.read_text() for file in SOURCES[name])))
    architecture = architecture_of(name, "here")
    read = {key for keys in architecture.keys.values() for key in keys.split("|")} | set(architecture.required)
    assert len(asked & read) >= 6
    assert len(SOURCES) >= 8
    assert asked - read - ELSEWHERE - NEUTRAL == set()


def test_unknown_type() -> None:
    """The error names all known types, and the nearest only for a flag: a type in a file is not misspelled."""
    for name in ("qwen33", "gpt_neo", "llama4", "qwen", 7):
        with pytest.raises(CheckpointError) as caught:
            architecture_of(name, "here/config.json")
        message = str(caught.value)
        assert message.startswith(f"here/config.json: model_type {name!r} is not supported. Known: llama, ")
    with pytest.raises(CheckpointError, match=r"'qwen33' is not supported. Did you mean 'qwen3'\? Known: llama, "):
        architecture_of("qwen33", "--architecture")
    for known in ("llama", "mistral", "qwen2", "opt", "bloom", "gpt_neox", "glm", "chatglm", "baichuan", "internlm2"):
        assert f" {known}," in message or f" {known}." in message


def test_silence_means_what_it_means_to_transformers() -> None:
    """Files that leave out keys whose default is not nothing."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 30, "num_attention_heads": 4, "intermediate_size": 96,
             "vocab_size": 96}  # fmt: skip
    mistral = architecture_of("mistral", "here").read(sizes, "here")
    assert {mistral.window(i) for i in range(30)} == {4096}
    kinds = {"layer_types": ["full_attention", "sliding_attention"] * 15}  # AutoModel takes it for a Ministral then
    ministral = architecture_of("mistral", "here").read(sizes | kinds, "here")
    assert [ministral.window(i) for i in range(30)] == [None, 4096] * 15
    qwen = architecture_of("qwen2", "here").read(sizes | {"use_sliding_window": True, "sliding_window": 8}, "here")
    assert [qwen.window(i) for i in range(30)] == [None] * 28 + [8] * 2
    assert architecture_of("qwen2", "here").read(sizes, "here").window(29) is None


def test_older_spelling_of_rope() -> None:
    """Before transformers 5: at the top, with `type`; after it, in rope_parameters."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
             "vocab_size": 96}  # fmt: skip
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}
    for spelling in (old, new):
        args = architecture_of("llama", "here").read(sizes | spelling, "here")
        assert (args.rope_theta, args.rope_scaling) == (5e5, RopeScaling(kind="linear", factor=4.0))
    pythia = {**sizes, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}}
    args = architecture_of("gpt_neox", "here").read(pythia, "here")
    assert (args.rope_theta, args.rotary_dim) == (7.0, 8)
