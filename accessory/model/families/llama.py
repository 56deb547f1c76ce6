"""LLaMA 1, 2, 3 and what shares their block: how other files name its settings and weights."""

from __future__ import annotations

import re
from typing import Any

from accessory.errors import CheckpointError
from accessory.model.args import ModelArgs

HF_MODEL_TYPES = ("llama", "mistral")
GGUF_ARCHITECTURES = ("llama",)

_HF_BLOCK = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_HF_OUTER = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
_GGUF_BLOCK = {
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
_GGUF_OUTER = {
    "token_embd.weight": "tok_embeddings.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "output.weight",
}
_NEEDLESS = re.compile(r"rope\.freqs|rotary_emb\.inv_freq|rope_freqs\.weight")


def from_hf_name(name: str) -> str | None:
    """Our name of a Hugging Face LLaMA tensor; None for one that carries nothing; an unknown name is kept."""
    return _translate(name, r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", _HF_BLOCK, _HF_OUTER)


def from_gguf_name(name: str) -> str | None:
    """Our name of a GGUF LLaMA tensor; None for one that carries nothing; an unknown name is kept."""
    return _translate(name, r"blk\.(\d+)\.(.+)\.(weight|bias)", _GGUF_BLOCK, _GGUF_OUTER)


def from_upstream_name(name: str) -> str | None:
    """Our name of a tensor in Meta's or LLaMA2-Accessory's files (which prefix `llma.`)."""
    name = name.removeprefix("llma.")
    return None if _NEEDLESS.search(name) else name


def _translate(name: str, pattern: str, block: dict[str, str], outer: dict[str, str]) -> str | None:
    if _NEEDLESS.search(name):
        return None
    match = re.fullmatch(pattern, name)
    if match and match[2] in block:
        return f"layers.{match[1]}.{block[match[2]]}.{match[3]}"
    return outer.get(name, name)


def interleaved_heads(name: str, args: ModelArgs) -> int | None:
    """Heads whose rows a Hugging Face file permuted (it rotates channel halves, Meta neighbouring pairs), else None."""
    if re.search(r"attention\.wq\.", name):
        return args.n_heads
    return args.n_kv_heads if re.search(r"attention\.wk\.", name) else None


def args_from_hf(config: dict[str, Any], source: str) -> ModelArgs:
    """Settings from a Hugging Face `config.json`. Raises `CheckpointError` for what this decoder does not do."""
    kind = config.get("model_type")
    if kind not in HF_MODEL_TYPES:
        raise CheckpointError(f"{source}: model_type {kind!r} is not supported; known: {', '.join(HF_MODEL_TYPES)}.")
    if config.get("sliding_window") and config.get("sliding_window") < config.get("max_position_embeddings", 0):
        raise CheckpointError(f"{source}: sliding_window {config['sliding_window']} is not supported yet.")
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{source}: hidden_act {config['hidden_act']!r} is not supported; expected 'silu'.")
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
    known_scaling = ("linear", "llama3", "default")
    scaling_kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if scaling_kind not in known_scaling:
        raise CheckpointError(f"{source}: rope scaling {scaling_kind!r} is not supported; known: {known_scaling}.")
    return ModelArgs(
        dim=config["hidden_size"],
        n_layers=config["num_hidden_layers"],
        n_heads=config["num_attention_heads"],
        n_kv_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        vocab_size=config["vocab_size"],
        hidden_dim=config["intermediate_size"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=config.get("rope_theta", rope.get("rope_theta", 10000.0)),
        rope_scaling=scaling,
        qkv_bias=config.get("attention_bias", False),
        out_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        max_seq_len=config.get("max_position_embeddings", 2048),
    )


def args_from_gguf(fields: dict[str, Any], tensor_names: set[str], source: str) -> ModelArgs:
    """Settings from a GGUF file's metadata. Raises `CheckpointError` for another architecture."""
    kind = fields.get("general.architecture")
    if kind not in GGUF_ARCHITECTURES:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise CheckpointError(f"{source}: architecture {kind!r} is not supported; known: {known}.")
    if "rope_freqs.weight" in tensor_names:
        raise CheckpointError(
            f"{source}: this GGUF carries Llama 3 rope factors; give the Hugging Face directory instead."
        )
    get = {key.removeprefix(f"{kind}."): value for key, value in fields.items()}.get
    heads = get("attention.head_count")
    scaling = get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise CheckpointError(f"{source}: rope scaling {scaling!r} is not supported; known: none, linear.")
    return ModelArgs(
        dim=get("embedding_length"),
        n_layers=get("block_count"),
        n_heads=heads,
        n_kv_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length"),
        vocab_size=get("vocab_size", -1),
        hidden_dim=get("feed_forward_length"),
        norm_eps=get("attention.layer_norm_rms_epsilon", 1e-5),
        rope_theta=get("rope.freq_base", 10000.0),
        rope_scaling={"kind": "linear", "factor": get("rope.scaling.factor", 1.0)} if scaling == "linear" else None,
        tie_word_embeddings="output.weight" not in tensor_names,
        max_seq_len=get("context_length", 2048),
    )
