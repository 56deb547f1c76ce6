"""GPT-NeoX and Pythia (Black et al. 2022): part of each head rotates, attention and MLP read the same input."""

from __future__ import annotations

from accessory.model.families.architecture import Architecture, Fused, Gguf, Names, Rope
from accessory.model.families.bloom import GGUF_NAMES
from accessory.model.families.llama import BIASES, DEFAULTS, HALVES, QKV, UNGROUPED_KEYS

ARCHITECTURES = (
    Architecture(
        name="gpt_neox",
        family="neox",
        class_name="GPTNeoXForCausalLM",
        names=Names(
            outer={
                "gpt_neox.embed_in": "tok_embeddings",
                "gpt_neox.final_layer_norm": "norm",
                "embed_out": "output",
                "lm_head": "output",  # in some files; embed_out is what is written
            },
            block="gpt_neox.layers.{}.",
            inner={
                "attention.query_key_value": Fused(QKV, "heads"),
                "attention.dense": "attention.wo",
                "mlp.dense_h_to_4h": "feed_forward.w1",
                "mlp.dense_4h_to_h": "feed_forward.w2",
                "input_layernorm": "attention_norm",
                "post_attention_layernorm": "ffn_norm",
            },
            needless=r"rotary_emb\.inv_freq|attention\.(masked_)?bias$",
        ),
        keys={
            **UNGROUPED_KEYS,
            "norm_eps": "layer_norm_eps",
            "parallel_residual": "use_parallel_residual",
            "qkv_bias": "attention_bias",
            "out_bias": "attention_bias",
        },
        defaults=DEFAULTS
        | {"activation": "gelu", "norm_eps": 1e-5, "parallel_residual": True, "qkv_bias": True, "out_bias": True},
        fixed=HALVES | {"gated": False, "norm": "layer", "mlp_bias": True},
        rope=Rope(theta_key="rotary_emb_base", share_key="rotary_pct", share=0.25),
        gguf=Gguf("gptneox", "halves", GGUF_NAMES, biases=tuple(BIASES), tied=False, partial_rotary=True),
    ),
)
