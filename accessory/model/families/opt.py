"""OPT (Zhang et al. 2022): learned positions, LayerNorm with a bias, ReLU; the 350M normalizes after each layer."""

from __future__ import annotations

from accessory.errors import CheckpointError
from accessory.model.args import ModelArgs
from accessory.model.families.architecture import Architecture, Config, Names
from accessory.model.families.llama import ALL_BIASES, BIASES, UNGROUPED_KEYS


class _Opt(Architecture):
    """One switch says where the norms are, and whether there is a final one."""

    def read(self, config: Config, source: str) -> ModelArgs:
        """See `Architecture.read`."""
        if not config.get("layer_norm_elementwise_affine", True):
            raise CheckpointError(f"{source}: norms without weights (layer_norm_elementwise_affine) are not supported.")
        before = config.get("do_layer_norm_before", True)
        placement = {
            "norm_placement": "before" if before else "after",
            "final_norm": before and not config.get("_remove_final_layer_norm", False),
        }
        return super().read(config, source).model_copy(update=placement)

    def write(self, args: ModelArgs) -> Config:
        """See `Architecture.write`."""
        before = args.norm_placement == "before"
        config = super().write(args.model_copy(update={"norm_placement": "before", "final_norm": True}))
        config["do_layer_norm_before"] = before
        config["_remove_final_layer_norm"] = before and not args.final_norm
        return config


ARCHITECTURES = (
    _Opt(
        name="opt",
        family="opt",
        class_name="OPTForCausalLM",
        names=Names(
            prefix="model.",
            outer={
                "model.decoder.embed_tokens": "tok_embeddings",
                "model.decoder.embed_positions": "pos_embeddings",
                "model.decoder.project_in": "project_in",
                "model.decoder.project_out": "project_out",
                "model.decoder.final_layer_norm": "norm",
                "model.lm_head": "output",
            },
            block="model.decoder.layers.{}.",
            inner={
                "self_attn.q_proj": "attention.wq",
                "self_attn.k_proj": "attention.wk",
                "self_attn.v_proj": "attention.wv",
                "self_attn.out_proj": "attention.wo",
                "fc1": "feed_forward.w1",
                "fc2": "feed_forward.w2",
                "self_attn_layer_norm": "attention_norm",
                "final_layer_norm": "ffn_norm",
            },
        ),
        keys={
            **{ours: theirs for ours, theirs in UNGROUPED_KEYS.items() if ours != "norm_eps"},
            **dict.fromkeys(BIASES, "enable_bias"),
            "embedding_dim": "word_embed_proj_dim",
            "hidden_dim": "ffn_dim",
            "activation": "activation_function",
        },
        defaults=ALL_BIASES | {"embedding_dim": None, "activation": "relu", "tie_word_embeddings": True},
        fixed={"gated": False, "norm": "layer", "norm_eps": 1e-5, "position": "learned", "position_offset": 2},
        rope=None,
    ),
)
