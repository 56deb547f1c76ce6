"""InternLM 1 (biases on q, k, v and o), 2 (q, k and v in one matrix, by key/value head) and 3: LLaMA's block."""

from __future__ import annotations

from accessory.model.families.architecture import Architecture, Fused, Gguf, Names, Rope
from accessory.model.families.llama import (
    BIASES,
    DEFAULTS,
    GGUF,
    GGUF_NAMES,
    HALVES,
    KEYS,
    NAMES,
    NO_BIASES,
    UNGROUPED_KEYS,
)

_NAMES_2 = Names(
    outer={"model.tok_embeddings": "tok_embeddings", "model.norm": "norm", "output": "output"},
    block="model.layers.{}.",
    inner={
        "attention.wqkv": Fused(("attention.wq", "attention.wk", "attention.wv"), "kv_heads"),
        "attention.wo": "attention.wo",
        "feed_forward.w1": "feed_forward.w1",
        "feed_forward.w2": "feed_forward.w2",
        "feed_forward.w3": "feed_forward.w3",
        "attention_norm": "attention_norm",
        "ffn_norm": "ffn_norm",
    },
)

ARCHITECTURES = (
    Architecture(
        name="internlm",
        family="llama",
        class_name="InternLMForCausalLM",
        names=NAMES,
        keys=UNGROUPED_KEYS | {"qkv_bias": "bias", "out_bias": "bias"},
        defaults=DEFAULTS | {"qkv_bias": True, "out_bias": True},
        fixed=HALVES,
        gguf=GGUF,
    ),
    Architecture(
        name="internlm2",
        family="llama",
        class_name="InternLM2ForCausalLM",
        names=_NAMES_2,
        keys=KEYS | {"qkv_bias": "bias", "out_bias": "bias"},
        defaults=DEFAULTS | {"qkv_bias": True, "out_bias": True},
        fixed=HALVES,
        rope=Rope(theta=10000.0),
        gguf=Gguf("internlm2", "pairs", GGUF_NAMES, tied=False),
    ),
    Architecture(
        name="internlm3",
        family="llama",
        class_name="InternLM3ForCausalLM",
        names=NAMES,
        keys=KEYS | {ours: f"{their}|{old}" for (ours, their), old in
                     zip(BIASES.items(), ("qkv_bias", "qkv_bias", "bias"), strict=True)},
        defaults=DEFAULTS | NO_BIASES,
        fixed=HALVES,
        gguf=GGUF,
    ),
)  # fmt: skip
