"""Settings of side tuning, and the side network's shape that follows from them and the base's."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from accessory.errors import ConfigError
from accessory.model.args import ModelArgs

NARROWEST_HEAD = 32
"""Channels of a head, below which attention on a CPU costs as much as with wider ones (by head, not by width)."""


class SideSettings(BaseModel):
    """Keys of `--llama_config` that belong to side tuning; `activation` of published files is `adapter_activation`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    r: int = Field(default=16, ge=1, le=1 << 16)
    """The side network is 1/r as wide as the base."""
    alpha_r: float | None = None
    """Without effect, as in the published code; accepted because its files hold it."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on an adapter's input while training."""
    adapter_activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    """Activation between the two matrices of an adapter."""
    add_layer_norm_before_adapter: bool = False
    """Whether a LayerNorm stands before an adapter."""
    add_layer_norm_after_adapter: bool = True
    """Whether a LayerNorm stands after an adapter."""
    peft_hidden_size: int = Field(default=16, ge=1, le=1 << 16)
    """Channels between the two matrices of an adapter or of the downsample `lora`."""
    fan_in_fan_out: bool = False
    """Without effect, as in the published code; accepted because its files hold it."""
    downsample: Literal["adapter", "lora", "linear", "avgpool", "maxpool"] = "adapter"
    """How a side block reads a base state: two matrices with an activation between, two, one, or pooled channels."""
    state_bits: Literal[16, 8] = 16
    """Bits in which a base state is kept for the gradient of its downsample: 16 is exact, 8 takes half the memory."""
    embedding_downsample: Literal["shared", "own"] = "shared"
    """Whether the embedding is read by the first block's downsample or by one of its own."""
    side_heads: int | None = Field(default=None, ge=1, le=1 << 16)
    """Attention heads of a side block; absent: as many as are 32 channels wide or more, or the base's if `released`."""
    gate: Literal["vector", "scalar"] = "vector"
    """Whether gates weigh each channel by itself or all alike."""
    side_layers: int | None = Field(default=None, ge=0, le=1 << 12)
    """A side block reads every n-th block of the base, counted from the last; 0: there are none, only a `tail`. Absent:
    1 if any key above this one is given, `tail` is 0 or `start` is `released`; else 0."""
    tail: int | None = Field(default=None, ge=0, le=1 << 12)
    """Last blocks of the base that have LoRA, and that gradients go back through. Absent: none where there are side
    blocks, else two fifths of the base's."""
    tail_rank: int = Field(default=16, ge=1, le=1 << 16)
    """Rank of that LoRA; its scale is 1."""
    tail_backward: Literal["labelled", "all"] = "labelled"
    """Tokens that gradients go back through in the tail: those with a label, or all, which takes longer."""
    label_share: float | None = Field(default=None, gt=0.0, le=1.0)
    """Share of a micro-batch's labelled tokens that are learned from, drawn anew each time; the others are only read.
    Absent: 1 if `released`, else 0.5."""
    start: Literal["base", "released"] = "base"
    """`base`: untrained, the model computes what its base does. `released`: form and start are the published code's."""

    @model_validator(mode="after")
    def _goes_together(self) -> SideSettings:
        names = list(type(self).model_fields)
        described = self.model_fields_set.intersection(names[: names.index("side_layers")])
        if self.side_layers is None:
            self.side_layers = int(bool(described) or self.start == "released" or self.tail == 0)
        if self.tail is None and self.side_layers:
            self.tail = 0
        if self.label_share is None:
            self.label_share = 1.0 if self.start == "released" else 0.5
        if self.side_layers == self.tail == 0:
            raise ValueError("nothing would be trained: set side_layers or tail above 0")
        if self.state_bits == 8 and self.add_layer_norm_before_adapter:
            raise ValueError("state_bits 8 with add_layer_norm_before_adapter: the norm keeps the state itself")
        if self.start == "released" and (self.tail or not self.side_layers):
            raise ValueError("start released has no tail: set tail to 0 and side_layers above 0, or start to base")
        return self

    def tail_of(self, n_layers: int) -> int:
        """Blocks in the tail of a base that has `n_layers`."""
        return max(2 * n_layers // 5, 1) if self.tail is None else self.tail

    def beside(self, args: ModelArgs) -> SideSettings:
        """The same beside a base of `args`, with the numbers that follow from it: other versions may have them follow
        otherwise. Raises `ConfigError` as `side_args` does.
        """
        heads = self.side_heads
        if heads is None and self.side_layers and self.start != "released":
            heads = side_args(args, self).n_heads
        return self.model_copy(update={"tail": self.tail_of(args.n_layers), "side_heads": heads})


def side_args(args: ModelArgs, settings: SideSettings) -> ModelArgs:
    """The blocks beside a base of `args`: 1/r as wide, with the base's norms, activation, biases and positions.

    Raises `ConfigError` naming the keys of --llama_config to change where the width does not divide into heads.
    """
    width, released = args.dim // settings.r, settings.start == "released"
    heads = settings.side_heads or (args.n_heads if released else _wide_heads(args.n_heads, width))
    kv_heads = args.n_kv_heads if released and settings.side_heads is None else heads
    head_dim = width // heads
    odd = args.position == "rotary" and head_dim % 2
    if not head_dim or width % heads or odd or args.hidden_dim < settings.r:
        raise ConfigError(
            f"--llama_config: r {settings.r} makes a side network of {width} channels, which do not divide into "
            f"{heads} heads{' of an even width' if args.position == 'rotary' else ''}.{_remedy(args, settings)}"
        )
    rotated = max(args.rotary_dim * head_dim // args.head_dim // 2 * 2, 2)
    read = args.n_layers - settings.tail_of(args.n_layers)
    return args.model_copy(
        update={
            "dim": width, "embedding_dim": width, "hidden_dim": args.hidden_dim // settings.r,
            "n_heads": heads, "n_kv_heads": kv_heads, "head_dim": head_dim, "rotary_dim": min(rotated, head_dim),
            "rotary_layout": "halves", "n_layers": -(-read // settings.side_layers),
            "sliding_layers": None,
        }
    )  # fmt: skip


def _wide_heads(most: int, width: int) -> int:
    """The largest number of heads that divides `most` and `width`, of an even width from `NARROWEST_HEAD` on; or 1."""
    fitting = (n for n in range(most, 1, -1) if not most % n and not width % (2 * n) and width // n >= NARROWEST_HEAD)
    return next(fitting, 1)


def _remedy(args: ModelArgs, settings: SideSettings) -> str:
    """Values of `r` that do, the nearest first."""
    heads = settings.side_heads or (args.n_heads if settings.start == "released" else 1)
    unit = heads * (2 if args.position == "rotary" else 1)
    fitting = [r for r in range(1, args.dim // unit + 1) if not (args.dim // r) % unit and args.hidden_dim >= r]
    nearest = sorted(fitting, key=lambda r: abs(r - settings.r))[:3]
    return f" An r that does: {', '.join(map(str, nearest))}." if nearest else " Give fewer side_heads."
