"""Norm tuning, bias tuning and LoRA (Hu et al. 2021), in any combination, beside a frozen base.

The keys and the parameter names are LLaMA2-Accessory's. NormBias is `norm_tuning` and `bias_tuning` without LoRA;
NormBiasLoRA adds `lora_rank`. Embedding and head are trained by `vocabulary_tuning` alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from accessory.errors import ConfigError
from accessory.method.base import Attachment, Initializer, Method
from accessory.method.layer_ranges import LayerNumbers
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.families import ARCHITECTURES
from accessory.model.families.architecture import Fused
from accessory.model.linear import Linear
from accessory.model.norm import Norm
from accessory.parallel.groups import Layout
from accessory.quant import PackedWeight

_SHOWN = 8  # blocks listed in an error
Target = Literal["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
QUANT_TARGETS = ("frozen", "lora", *get_args(Target))
"""Values of `--quant_targets`: linears without LoRA, those with it, or those of a name."""


class Peft(Method):
    """Trains norms, biases and low-rank factors, each if its setting says so."""

    class Settings(BaseModel):
        """Keys of `--llama_config` that belong to this method."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

        norm_tuning: bool = True
        """Train the weights of all norms, and their biases where they have some."""
        bias_tuning: bool = True
        """Add a bias to every linear of attention and feed-forward, and train it."""
        scale_tuning: bool = False
        """Multiply the outputs of every linear of attention and feed-forward by trained numbers that start at one."""
        lora_rank: int = Field(default=-1, ge=-1, le=1 << 16)
        """Rank R of LoRA; 0 or -1 leaves LoRA out."""
        lora_alpha: float | None = Field(default=None, ge=-(2.0**31), le=2.0**31)
        """LoRA is scaled by lora_alpha / lora_rank; absent means a scale of 1, as upstream."""
        lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
        """Dropout on LoRA's input while training."""
        lora_targets: list[Target] = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
        """Linears that get LoRA."""
        lora_layers: LayerNumbers | None = None
        """Blocks whose linears get it, such as "0-7,20" or [0, 1, 20]; absent: all."""
        vocabulary_tuning: bool = False
        """Train embedding and head whole, as tokens added to the vocabulary need."""
        vision_tuning: bool = False
        """Train all that lies between an image encoder and the embeddings, not only its biases and norms."""

        @field_validator("lora_targets", mode="before")
        @classmethod
        def _in_our_words(cls, value: Any) -> Any:
            known = get_args(Target)
            foreign = [name for name in value if name not in known] if isinstance(value, list) else []
            if ours := sorted({our for name in foreign for our in _our_linears(str(name))}):
                raise ValueError(
                    f"expected names of {', '.join(known)}; {', '.join(map(str, foreign))} would be {', '.join(ours)}"
                )
            return value

        @model_validator(mode="after")
        def _trains_something(self) -> Peft.Settings:
            others = self.norm_tuning, self.bias_tuning, self.scale_tuning, self.vocabulary_tuning, self.vision_tuning
            if not (any(others) or (self.lora_rank > 0 and self.lora_targets)):
                raise ValueError("nothing would be trained: set norm_tuning, bias_tuning, or lora_rank above 0")
            return self

        @property
        def lora_scale(self) -> float:
            """What LoRA's product is multiplied by."""
            return 1.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank

    suffix: ClassVar[str] = "_peft"
    also_called: ClassVar[tuple[str, ...]] = ("lora", "qlora")
    summary: ClassVar[str] = "norms, biases and LoRA"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "normbias": {},
        "normbiaslora": {"lora_rank": 16},
        "lora": {"lora_rank": 16, "norm_tuning": False, "bias_tuning": False},
        "norm": {"bias_tuning": False},
    }
    # Who gives the flag knows it from qlora or peft, where LoRA alone is trained; the key is LLaMA2-Accessory's.
    beside_flags: ClassVar[Mapping[str, dict[str, Any]]] = {"lora_rank": {"norm_tuning": False, "bias_tuning": False}}

    @classmethod
    def storage_fault(cls, quant_type: str) -> str | None:
        """What a storage has to train is trained too."""
        return None

    @property
    def trains_vocabulary(self) -> bool:
        """Only with `vocabulary_tuning`."""
        return self.settings.vocabulary_tuning

    @property
    def drops_out(self) -> bool:
        """On LoRA's input."""
        return self.settings.lora_rank > 0 and self.settings.lora_dropout > 0

    def conflict(self, stated: Mapping[str, Any], args: ModelArgs) -> str | None:
        """See `Method.conflict`: the scale of LoRA's product is stored in the settings alone."""
        keys = ("lora_rank", "lora_alpha")
        try:
            trained = type(self.settings)(**{key: stated[key] for key in keys if key in stated})
        except ValidationError:  # no LoRA settings that could be compared
            return None
        if min(trained.lora_rank, self.settings.lora_rank) <= 0:
            return None
        if math.isclose(trained.lora_scale, self.settings.lora_scale, rel_tol=1e-6):
            return None
        before, now = ({key: getattr(its, key) for key in keys} for its in (trained, self.settings))
        return (
            f"its LoRA was trained with {before}, a scale of {trained.lora_scale:g}; {now} makes it "
            f"{self.settings.lora_scale:g}. Leave both out of --llama_config, or give a lora_alpha of "
            f"{trained.lora_scale * self.settings.lora_rank:g} (--llama_config's scale is lora_alpha / lora_rank)"
        )

    def check(self, args: ModelArgs, layout: Layout, data_parallel: str) -> None:
        """See `Method.check`; the base must have the blocks that get LoRA."""
        super().check(args, layout, data_parallel)
        absent = [number for number in self.settings.lora_layers or [] if number >= args.n_layers]
        if absent and self.settings.lora_rank > 0:
            raise ConfigError(
                f"--llama_config: 'lora_layers' names {', '.join(map(str, absent[:_SHOWN]))}; the base has "
                f"{args.n_layers} blocks, 0 to {args.n_layers - 1}."
            )

    def trains_of_vision(self, name: str, parameter: nn.Parameter) -> bool:
        """Biases, as upstream; norms' weights, which have one dimension, as the settings say; all if they say that."""
        norm = parameter.dim() == 1 and name.endswith(".weight")
        return self.settings.vision_tuning or name.endswith(".bias") or (norm and self.settings.norm_tuning)

    def attach(self, decoder: Decoder) -> Attachment:
        """Add biases and LoRA factors; train these, norms and the storage's trained parts, as the settings say."""
        attachment = Attachment()
        if self.settings.vocabulary_tuning:
            self._choose_vocabulary(decoder, attachment)
        for name, module in decoder.named_modules():
            if isinstance(module, Norm) and self.settings.norm_tuning:
                attachment.trainable |= {f"{name}.{leaf}" for leaf, _ in module.named_parameters()}
            elif isinstance(module, Linear):
                if self.settings.bias_tuning:
                    self._attach_bias(name, module, attachment)
                if self.settings.scale_tuning:
                    self._attach_scale(name, module, attachment)
                if isinstance(module.weight, PackedWeight):
                    attachment.trainable |= {f"{name}.weight.{part}" for part in module.weight.trained}
                if self.has_lora(name):
                    self._attach_lora(name, module, attachment)
        return attachment

    def has_lora(self, linear: str) -> bool:
        """See `Method.has_lora`."""
        settings = self.settings
        if settings.lora_rank <= 0 or linear.rsplit(".", 1)[-1] not in settings.lora_targets:
            return False
        return settings.lora_layers is None or int(linear.split(".")[1]) in settings.lora_layers

    @staticmethod
    def _choose_vocabulary(decoder: Decoder, attachment: Attachment) -> None:
        for name in ("tok_embeddings", "output"):
            if (module := getattr(decoder, name)) is not None:
                module.float()
                attachment.trainable.add(f"{name}.weight")

    def _attach_bias(self, name: str, linear: Linear, attachment: Attachment) -> None:
        if linear.bias is None:
            attachment.initial[f"{name}.bias"] = _zeros(linear.out_features)
        linear.add_bias(torch.float32)
        attachment.trainable.add(f"{name}.bias")

    def _attach_scale(self, name: str, linear: Linear, attachment: Attachment) -> None:
        linear.add_scale()
        attachment.initial[f"{name}.scale"] = _ones(linear.out_features)
        attachment.trainable.add(f"{name}.scale")

    def _attach_lora(self, name: str, linear: Linear, attachment: Attachment) -> None:
        rank = self.settings.lora_rank
        linear.add_lora(rank, self.settings.lora_scale, self.settings.lora_dropout)
        attachment.initial[f"{name}.lora_a.weight"] = truncated_normal(rank, linear.in_features)
        attachment.initial[f"{name}.lora_b.weight"] = _zeros(linear.out_features, rank)
        attachment.trainable |= {f"{name}.lora_a.weight", f"{name}.lora_b.weight"}


def _our_linears(name: str) -> set[str]:
    """Our names of the linears that some Hugging Face model calls `name`."""
    modules = [item for a in ARCHITECTURES.values() for item in a.names.inner.items()]
    ours = [
        our.parts if isinstance(our, Fused) else (our,) for their, our in modules if their.rsplit(".", 1)[-1] == name
    ]
    return {part.rsplit(".", 1)[-1] for parts in ours for part in parts} & set(get_args(Target))


def _zeros(*shape: int):
    return lambda _generator: torch.zeros(shape)


def _ones(*shape: int):
    return lambda _generator: torch.ones(shape)


def truncated_normal(*shape: int, std: float = 0.02) -> Initializer:
    """The initializer of a new lora_a, fp32."""
    return lambda generator: nn.init.trunc_normal_(
        torch.empty(shape), std=std, a=-2 * std, b=2 * std, generator=generator
    )
