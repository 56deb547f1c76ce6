"""Qwen 1.5, 2 and 2.5 (biases on q, k and v) and Qwen 3 (norms on q and k): LLaMA's block otherwise."""

from __future__ import annotations

from dataclasses import replace

from accessory.model.families.architecture import Gguf
from accessory.model.families.llama import DEFAULTS, GGUF_NAMES, HALVES, KEYS, MISTRAL, NAMES

_QK_NORMS = {"self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm"}
_GGUF_QK_NORMS = {"attn_q_norm": "attention.q_norm", "attn_k_norm": "attention.k_norm"}

ARCHITECTURES = (
    replace(
        MISTRAL,
        name="qwen2",
        class_name="Qwen2ForCausalLM",
        fixed=HALVES | {"qkv_bias": True},
        sliding="switched",
        gguf=Gguf("qwen2", "halves", GGUF_NAMES),
    ),
    replace(
        MISTRAL,
        name="qwen3",
        class_name="Qwen3ForCausalLM",
        names=replace(NAMES, inner={**NAMES.inner, **_QK_NORMS}),
        keys=KEYS | {"qkv_bias": "attention_bias", "out_bias": "attention_bias"},
        defaults=DEFAULTS | {"qkv_bias": False, "out_bias": False},
        fixed=HALVES | {"qk_norm": True},
        sliding="switched",
        gguf=Gguf(
            "qwen3", "halves", replace(GGUF_NAMES, inner={**GGUF_NAMES.inner, **_GGUF_QK_NORMS}), wide_heads=True
        ),
    ),
)
