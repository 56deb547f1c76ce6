"""InternLM 1 (biases on q, k, v and o), 2 (q, k and v in one matrix, by key/value head) and 3: LLaMA's block."""

from __future__ import annotations

from dataclasses import replace

from accessory.errors import CheckpointError
from accessory.model.args import ModelArgs
from accessory.model.families.architecture import Architecture, Config, Fused, Gguf, Names
from accessory.model.families.llama import DEFAULTS, GGUF_NAMES, HALVES, KEYS, LLAMA, NAMES, QKV, UNGROUPED_KEYS

_OURS = ("attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "attention_norm", "ffn_norm")
_NAMES_2 = Names(
    outer={"model.tok_embeddings": "tok_embeddings", "model.norm": "norm", "output": "output"},
    block="model.layers.{}.",
    inner={"attention.wqkv": Fused(QKV, "kv_heads"), **{name: name for name in _OURS}},
)

_KINDS = {"origin": "default", "dynamic": "dynamic"}


class _InternLm(Architecture):
    """Has its own names for rotary settings: the base, and whether it grows beyond the trained length."""

    def read(self, config: Config, source: str) -> ModelArgs:
        """See `Architecture.read`. A file without `rotary` is of the first version, whose base was fixed."""
        if (rotary := config.get("rotary")) is None:
            return super().read(config, source)
        if not isinstance(rotary, dict) or rotary.get("type") not in _KINDS:
            known = ", ".join(_KINDS)
            raise CheckpointError(f"{source}: rotary is {rotary!r}; expected a base and a type, one of {known}.")
        scaling = {"type": _KINDS[rotary["type"]], "factor": rotary.get("scaling_factor", 1.0)}
        return super().read({**config, "rope_theta": rotary.get("base", 10000.0), "rope_scaling": scaling}, source)

    def _written_rope(self, args: ModelArgs) -> Config:
        dynamic = args.rope_scaling is not None and args.rope_scaling.kind == "dynamic"
        rotary = {"base": args.rope_theta, "type": "dynamic" if dynamic else "origin"}
        return {"rotary": rotary | ({"scaling_factor": args.rope_scaling.factor} if dynamic else {})}


_KEYS = {"qkv_bias": "bias", "out_bias": "bias"}
_DEFAULTS = DEFAULTS | {"qkv_bias": True, "out_bias": True}

ARCHITECTURES = (
    _InternLm(
        name="internlm",
        native=False,
        family="llama",
        class_name="InternLMForCausalLM",
        names=NAMES,
        keys=UNGROUPED_KEYS | _KEYS,
        defaults=_DEFAULTS,
        fixed=HALVES,
        gguf=LLAMA.gguf,
    ),
    replace(
        LLAMA,
        name="internlm2",
        native=False,
        class_name="InternLM2ForCausalLM",
        names=_NAMES_2,
        keys=KEYS | _KEYS,
        defaults=_DEFAULTS,
        gguf=Gguf("internlm2", "pairs", GGUF_NAMES, tied=False),
    ),
    replace(
        LLAMA,
        name="internlm3",
        class_name="InternLM3ForCausalLM",
        keys=KEYS
        | {"qkv_bias": "attention_bias|qkv_bias", "out_bias": "attention_bias|qkv_bias", "mlp_bias": "mlp_bias|bias"},
    ),
)
