"""Baichuan 1 and 2, 7B (rotary) and 13B (ALiBi): LLaMA's block with q, k and v in one matrix.

Baichuan 2 scales the rows of its head to length 1 whenever it is used. We do so once, when it is read, as its authors
advise for running it with Baichuan 1's code: from then on, and in what is saved, it is a Baichuan 1.
"""

from __future__ import annotations

from dataclasses import replace

from accessory.model.args import ModelArgs
from accessory.model.families.architecture import Architecture, Config, Fused, Gguf
from accessory.model.families.llama import DEFAULTS, GGUF_NAMES, HALVES, NAMES, QKV, UNGROUPED_KEYS

_OTHERS = {their: our for their, our in NAMES.inner.items() if our not in QKV}
_NAMES = replace(NAMES, inner={"self_attn.W_pack": Fused(QKV), **_OTHERS})


class _Baichuan(Architecture):
    """One model type for two kinds of position: only the 7B's files state a number of positions."""

    def read(self, config: Config, source: str) -> ModelArgs:
        """See `Architecture.read`."""
        args = super().read(config, source)
        return args if "max_position_embeddings" in config else args.model_copy(update={"position": "alibi"})

    def write(self, args: ModelArgs) -> Config:
        """See `Architecture.write`."""
        config = super().write(args.model_copy(update={"position": "rotary"}))
        if args.position == "alibi":
            config["model_max_length"] = config.pop("max_position_embeddings")
        return config


ARCHITECTURES = (
    _Baichuan(
        name="baichuan",
        native=False,
        family="llama",
        class_name="BaichuanForCausalLM",
        names=_NAMES,
        keys={**UNGROUPED_KEYS, "max_seq_len": "max_position_embeddings|model_max_length"},
        defaults=DEFAULTS,
        fixed=HALVES,
        gguf=Gguf("baichuan", "pairs", GGUF_NAMES, positions={32: "rotary", 40: "alibi"}, tied=False),
        # A training setting in every config.json of Baichuan 2 and none of Baichuan 1; nothing else tells them apart.
        unit_head_key="z_loss_weight",
    ),
)
