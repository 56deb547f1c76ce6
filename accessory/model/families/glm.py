"""GLM-4 9B (`glm`), GLM-4 0414 (`glm4`, with norms on both sides of a layer) and ChatGLM2 and 3 (`chatglm`).

Half of each head rotates, neighbouring channels together; gate and up are one matrix.
"""

from __future__ import annotations

from dataclasses import replace

from accessory.errors import CheckpointError
from accessory.model.args import ModelArgs
from accessory.model.families.architecture import Architecture, Config, Fused, Gguf, Names, Rope
from accessory.model.families.llama import DEFAULTS, GGUF_NAMES, KEYS, LLAMA, NAMES, QKV

_GATE_UP = Fused(("feed_forward.w1", "feed_forward.w3"))
_INNER = {
    **{their: our for their, our in NAMES.inner.items() if not their.startswith("mlp.")},
    "mlp.gate_up_proj": _GATE_UP,
    "mlp.down_proj": "feed_forward.w2",
}
_SANDWICH = {"post_self_attn_layernorm": "attention_post_norm", "post_mlp_layernorm": "ffn_post_norm"}
_PAIRS = {"rotary_layout": "pairs"}
_GGUF_INNER = {their: our for their, our in GGUF_NAMES.inner.items() if their != "ffn_gate"} | {"ffn_up": _GATE_UP}
_GLM_GGUF = Gguf("chatglm", "pairs", replace(GGUF_NAMES, inner=_GGUF_INNER), partial_rotary=True)
_GLM4_NORMS = {"post_attention_norm": "attention_post_norm", "post_ffw_norm": "ffn_post_norm"}


class _ChatGlm(Architecture):
    """Has its own names for all keys. rope_ratio multiplies the base of 10,000, or divides positions (ChatGLM2)."""

    def read(self, config: Config, source: str) -> ModelArgs:
        """See `Architecture.read`."""
        if "position_encoding_2d" in config or "inner_hidden_size" in config:
            raise CheckpointError(
                f"{source}: this is the first ChatGLM-6B, with positions in two dimensions and a prompt that is read "
                "in both directions; that is not supported. ChatGLM2, ChatGLM3 and GLM-4 are."
            )
        ratio = config.get("rope_ratio", 1.0)
        rope: Config = {"rope_theta": 10000.0 * ratio, "rope_scaling": None}
        if ratio != 1 and "chatglm2" in str(config.get("_name_or_path")).lower():  # ChatGLM2-32K: only the name tells
            rope = {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": ratio}}
        return super().read({**config, **rope}, source)

    def _written_rope(self, args: ModelArgs) -> Config:
        return {"rope_ratio": args.rope_theta / 10000.0}


_GLM = replace(
    LLAMA,
    name="glm",
    family="glm",
    class_name="GlmForCausalLM",
    names=replace(NAMES, inner=_INNER),
    keys=KEYS | {"qkv_bias": "attention_bias"},
    defaults=DEFAULTS | {"qkv_bias": True, "norm_eps": 1.5625e-07},
    fixed=_PAIRS,
    rope=Rope(share_key="partial_rotary_factor", share=0.5),
    gguf=_GLM_GGUF,
)
_GLM4_GGUF_NAMES = replace(GGUF_NAMES, inner={**_GGUF_INNER, **_GLM4_NORMS})

ARCHITECTURES = (
    _GLM,
    replace(
        _GLM,
        name="glm4",
        class_name="Glm4ForCausalLM",
        names=replace(NAMES, inner={**_INNER, **_SANDWICH}),
        fixed=_PAIRS | {"norm_placement": "both"},
        gguf=replace(_GLM_GGUF, architecture="glm4", names=_GLM4_GGUF_NAMES, wide_heads=True),
    ),
    _ChatGlm(
        name="chatglm",
        native=False,
        family="glm",
        class_name="ChatGLMForConditionalGeneration",
        names=Names(
            outer={
                "transformer.embedding.word_embeddings": "tok_embeddings",
                "transformer.encoder.final_layernorm": "norm",
                "transformer.output_layer": "output",
            },
            block="transformer.encoder.layers.{}.",
            inner={
                "self_attention.query_key_value": Fused(QKV),
                "self_attention.dense": "attention.wo",
                "mlp.dense_h_to_4h": _GATE_UP,
                "mlp.dense_4h_to_h": "feed_forward.w2",
                "input_layernorm": "attention_norm",
                "post_attention_layernorm": "ffn_norm",
            },
        ),
        keys={
            "dim": "hidden_size",
            "n_layers": "num_layers",
            "n_heads": "num_attention_heads",
            "n_kv_heads": "multi_query_group_num",
            "head_dim": "kv_channels",
            "vocab_size": "padded_vocab_size",
            "hidden_dim": "ffn_hidden_size",
            "norm_eps": "layernorm_epsilon",
            "qkv_bias": "add_qkv_bias",
            "max_seq_len": "seq_length",
        },
        defaults={"norm_eps": 1e-5, "qkv_bias": False, "max_seq_len": 2048},
        fixed=_PAIRS,
        required={
            "multi_query_attention": True,
            "rmsnorm": True,
            "add_bias_linear": False,
            "apply_residual_connection_post_layernorm": False,
            "post_layer_norm": True,
            "original_rope": True,
            "interleaved_qkv": False,
            "pre_seq_len": None,
            "quantization_bit": 0,
        },
        rope=Rope(share=0.5),
        gguf=_GLM_GGUF,
    ),
)
