"""LLaMA 1, 2, 3 and SmolLM, and Mistral with its sliding window."""

from __future__ import annotations

from dataclasses import replace

from accessory.model.families.architecture import Architecture, Fused, Gguf, Names

NAMES = Names(
    outer={"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"},
    block="model.layers.{}.",
    inner={
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    },
)
QKV = ("attention.wq", "attention.wk", "attention.wv")
GGUF_NAMES = Names(
    outer={"token_embd": "tok_embeddings", "output_norm": "norm", "output": "output"},
    block="blk.{}.",
    inner={
        "attn_q": "attention.wq",
        "attn_k": "attention.wk",
        "attn_v": "attention.wv",
        "attn_output": "attention.wo",
        "ffn_gate": "feed_forward.w1",
        "ffn_down": "feed_forward.w2",
        "ffn_up": "feed_forward.w3",
        "attn_norm": "attention_norm",
        "ffn_norm": "ffn_norm",
        "attn_qkv": Fused(QKV),  # q, k and v may be one matrix; the separate names come first, and are the ones written
    },
    needless=r"rope_freqs\.weight",
)
KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "max_seq_len": "max_position_embeddings",
}
UNGROUPED_KEYS = {ours: theirs for ours, theirs in KEYS.items() if ours not in ("n_kv_heads", "head_dim")}
"""For models without grouped heads, whose heads are dim / n_heads wide."""
DEFAULTS = {"activation": "silu", "norm_eps": 1e-6, "tie_word_embeddings": False, "max_seq_len": 2048}
BIASES = {"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": "mlp_bias"}
NO_BIASES, ALL_BIASES = dict.fromkeys(BIASES, False), dict.fromkeys(BIASES, True)
HALVES = {"rotary_layout": "halves"}
"""Hugging Face rotates channel i of a head with channel i + E / 2."""
GGUF = Gguf("llama", "pairs", GGUF_NAMES, rope_factors=True, biases=tuple(BIASES), wide_heads=True)

LLAMA = Architecture(
    name="llama",
    family="llama",
    class_name="LlamaForCausalLM",
    names=NAMES,
    keys=KEYS | BIASES,
    defaults=DEFAULTS | NO_BIASES,
    fixed=HALVES,
    gguf=GGUF,
)
MISTRAL = replace(LLAMA, name="mistral", class_name="MistralForCausalLM", keys=KEYS, defaults=DEFAULTS, sliding="plain")

ARCHITECTURES = (LLAMA, MISTRAL)
