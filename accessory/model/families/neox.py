"""GPT-NeoX and Pythia (Black et al. 2022): part of each head rotates, attention and MLP read the same input."""

from __future__ import annotations

from accessory.model.families.architecture import Architecture, Fused, Gguf, Names, Rope
from accessory.model.families.bloom import GGUF_NAMES

_QKV = ("attention.wq", "attention.wk", "attention.wv")

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
                "attention.query_key_value": Fused(_QKV, "heads"),
                "attention.dense": "attention.wo",
                "mlp.dense_h_to_4h": "feed_forward.w1",
                "mlp.dense_4h_to_h": "feed_forward.w2",
                "input_layernorm": "attention_norm",
                "post_attention_layernorm": "ffn_norm",
            },
            needless=r"rotary_emb\.inv_freq|attention\.(masked_)?bias$",
        ),
        keys={
            "dim": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "vocab_size": "vocab_size",
            "hidden_dim": "intermediate_size",
            "activation": "hidden_act",
            "norm_eps": "layer_norm_eps",
            "parallel_residual": "use_parallel_residual",
            "qkv_bias": "attention_bias",
            "out_bias": "attention_bias",
            "tie_word_embeddings": "tie_word_embeddings",
            "max_seq_len": "max_position_embeddings",
        },
        defaults={
            "activation": "gelu",
            "norm_eps": 1e-5,
            "parallel_residual": True,
            "qkv_bias": True,
            "out_bias": True,
            "tie_word_embeddings": False,
            "max_seq_len": 2048,
        },
        fixed={"gated": False, "norm": "layer", "mlp_bias": True, "rotary_layout": "halves"},
        rope=Rope(theta_key="rotary_emb_base", share_key="rotary_pct", share=0.25),
        gguf=Gguf(
            "gptneox",
            "halves",
            GGUF_NAMES,
            biases=("qkv_bias", "out_bias", "mlp_bias"),
            tied=False,
            partial_rotary=True,
        ),
    ),
)
