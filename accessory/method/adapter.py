"""LLaMA-Adapter (Zhang et al. 2023): learned prefixes that the last blocks attend to, beside what `Peft` trains.

Keys and parameter names are LLaMA2-Accessory's, whose adapters of LLaMA and Llama 2 are read.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from accessory.errors import ConfigError
from accessory.method.base import Attachment
from accessory.method.peft import Peft
from accessory.method.prefix_attention import AdapterDecoder
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.linear import Linear
from accessory.parallel.groups import Layout
from accessory.parallel.tensor import slicing_of
from accessory.vision import Vision
from accessory.vision.clip_prefix import ClipPrefix

OWN = ("prefix", "prefix_gate", "prefix_new_gate")
"""Names of the parameters that this method adds to the decoder."""
NO_BIAS = (".wk", ".wv")
"""What the names of linears end in that get no bias: it would be added to the prefix's keys and values too."""


class Adapter(Peft):
    """Trains prefixes and their gates, and norms, biases and low-rank factors, each if its setting says so."""

    class Settings(Peft.Settings):
        """Keys of `--llama_config` that belong to this method."""

        prefix_layers: int | None = Field(default=None, ge=1, le=1 << 16)
        """How many of the last blocks attend to a prefix; absent: all."""
        prefix_len: int = Field(default=10, ge=1, le=1 << 16)
        """Rows of each block's prefix."""
        use_prefix_new_gate: bool = False
        """Multiply what a block gets from its prefix by one more trained number."""
        trainable_mode: Literal["sg", "mm_stage1", "mm_stage2"] = "sg"
        """sg, mm_stage1: prefixes are trained; mm_stage2: they stay as an earlier stage left them. mm_stage1 trains all
        that turns CLIP's view of an image into a part of the prefix."""
        v_embed_dim: int = Field(default=768, ge=1, le=1 << 16)
        """Width of the blocks that do that."""
        v_depth: int = Field(default=8, ge=0, le=1 << 10)
        """Their number."""
        v_num_heads: int = Field(default=16, ge=1, le=1 << 10)
        """Heads of their attention."""
        v_mlp_ratio: float = Field(default=4.0, gt=0, le=64)
        """Their inner width, as a multiple of v_embed_dim."""

        @field_validator("prefix_len", mode="before")
        @classmethod
        def _some_rows(cls, value: Any) -> Any:
            if value == 0:
                raise ValueError("0 would be no prefix; use a --llama_type that ends in _peft")
            return value

        @model_validator(mode="after")
        def _trains_something(self) -> Adapter.Settings:
            return self if self.trains_prefix else super()._trains_something()

        @model_validator(mode="after")
        def _heads_divide(self) -> Adapter.Settings:
            if self.v_embed_dim % self.v_num_heads:
                raise ValueError(f"v_num_heads {self.v_num_heads} does not divide v_embed_dim {self.v_embed_dim}")
            return self

        @property
        def trains_prefix(self) -> bool:
            """Whether prefixes and gates are trained."""
            return self.trainable_mode != "mm_stage2"

    suffix: ClassVar[str] = "_adapter"
    also_called: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "prefixes that the last blocks attend to, norms and biases"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"adapter": {}, "adapter_v2": {"scale_tuning": True}}
    merge_fault: ClassVar[str | None] = (
        "prefixes are attended to beside the text and change none of the base's matrices, so nothing can be "
        "added to them"
    )
    sees_by_clip: ClassVar[bool] = True
    adapter_fault: ClassVar[str | None] = (
        "PEFT's own prefixes (ADAPTION_PROMPT) have one gate for all heads of a block, without tanh"
    )

    def check(self, args: ModelArgs, layout: Layout, data_parallel: str) -> None:
        """See `Method.check`; the base must have the blocks that get a prefix."""
        super().check(args, layout, data_parallel)
        if (self.settings.prefix_layers or 0) > args.n_layers:
            raise ConfigError(
                f"--llama_config: 'prefix_layers' is {self.settings.prefix_layers}, the base has {args.n_layers} "
                f"blocks; expected {args.n_layers} or less."
            )

    def beside(self, args: ModelArgs) -> Adapter:
        """See `Method.beside`: the number of blocks."""
        return Adapter(self.settings.model_copy(update={"prefix_layers": self._layers(args)}))

    def _layers(self, args: ModelArgs) -> int:
        return self.settings.prefix_layers or args.n_layers

    def decoder(self, args: ModelArgs, **how: Any) -> Decoder:
        """The base with prefixes."""
        settings = self.settings
        return AdapterDecoder(args, self._layers(args), settings.prefix_len, settings.use_prefix_new_gate, **how)

    def sees(self, vision: Vision) -> Vision:
        """See `Method.sees`: a picture is added to its document's prefix."""
        s = self.settings
        sizes = {"width": s.v_embed_dim, "depth": s.v_depth, "heads": s.v_num_heads, "ratio": s.v_mlp_ratio}
        return ClipPrefix(vision.settings, length=s.prefix_len, **sizes)

    def trains_of_vision(self, name: str, parameter: nn.Parameter) -> bool:
        """See `Method.trains_of_vision`: all in the first of two stages, nothing in other modes."""
        return self.settings.trainable_mode == "mm_stage1" or self.settings.vision_tuning

    def attach(self, decoder: Decoder) -> Attachment:
        """As `Peft.attach`, but for biases of wk and wv; prefixes, which the decoder has, are trained in most modes.

        A mode in which they are not goes on from an earlier stage, so they have no start.
        """
        attachment = super().attach(decoder)
        if self.settings.trains_prefix:
            own = {name: p for name, p in decoder.named_parameters() if name in OWN}
            shapes = {name: slicing_of(p).whole_shape(tuple(p.shape), decoder.ranks) for name, p in own.items()}
            attachment.trainable |= own.keys()
            attachment.initial |= {name: _START[name](shape) for name, shape in shapes.items()}
        return attachment

    def _attach_bias(self, name: str, linear: Linear, attachment: Attachment) -> None:
        if not name.endswith(NO_BIAS):
            super()._attach_bias(name, linear, attachment)


_START = {
    "prefix": lambda shape: lambda generator: torch.randn(shape, generator=generator),
    "prefix_gate": lambda shape: lambda _generator: torch.zeros(shape),
    "prefix_new_gate": lambda shape: lambda _generator: torch.ones(shape),
}
