"""BLOOM and BLOOMZ (Le Scao et al. 2022): ALiBi, a norm on the embedding, q, k and v interleaved by head."""

from __future__ import annotations

from dataclasses import replace

from accessory.model.args import ModelArgs
from accessory.model.families.architecture import Architecture, Config, Fused, Gguf, Names
from accessory.model.families.llama import ALL_BIASES, BIASES, QKV

GGUF_NAMES = Names(
    outer={"token_embd": "tok_embeddings", "output_norm": "norm", "output": "output"},
    block="blk.{}.",
    inner={
        "attn_qkv": Fused(QKV),
        "attn_output": "attention.wo",
        "ffn_up": "feed_forward.w1",
        "ffn_down": "feed_forward.w2",
        "attn_norm": "attention_norm",
        "ffn_norm": "ffn_norm",
    },
)
"""For every model whose MLP has no gate."""


class _Bloom(Architecture):
    """Its MLP is four times as wide as the model, which no file says."""

    def read(self, config: Config, source: str) -> ModelArgs:
        """See `Architecture.read`."""
        args = super().read(config, source)
        return args.model_copy(update={"hidden_dim": 4 * args.dim})


ARCHITECTURES = (
    _Bloom(
        name="bloom",
        family="bloom",
        class_name="BloomForCausalLM",
        names=Names(
            prefix="transformer.",
            outer={
                "transformer.word_embeddings": "tok_embeddings",
                "transformer.word_embeddings_layernorm": "tok_norm",
                "transformer.ln_f": "norm",
                "transformer.lm_head": "output",
            },
            block="transformer.h.{}.",
            inner={
                "self_attention.query_key_value": Fused(QKV, "heads"),
                "self_attention.dense": "attention.wo",
                "mlp.dense_h_to_4h": "feed_forward.w1",
                "mlp.dense_4h_to_h": "feed_forward.w2",
                "input_layernorm": "attention_norm",
                "post_attention_layernorm": "ffn_norm",
            },
        ),
        keys={
            "dim": "hidden_size|n_embed",
            "n_layers": "n_layer|num_hidden_layers",
            "n_heads": "n_head|num_attention_heads",
            "vocab_size": "vocab_size",
            "norm_eps": "layer_norm_epsilon",
            "tie_word_embeddings": "tie_word_embeddings",
            "max_seq_len": "seq_length",
        },
        defaults={"norm_eps": 1e-5, "tie_word_embeddings": True, "max_seq_len": 2048},
        fixed=ALL_BIASES
        | {"gated": False, "activation": "gelu_tanh", "norm": "layer", "embedding_norm": True, "position": "alibi"},
        required={"apply_residual_connection_post_layernorm": False},
        rope=None,
        gguf=Gguf(
            "bloom",
            "pairs",
            replace(GGUF_NAMES, outer={**GGUF_NAMES.outer, "token_embd_norm": "tok_norm"}),
            biases=tuple(BIASES),
        ),
    ),
)
