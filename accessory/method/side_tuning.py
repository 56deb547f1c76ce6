"""Quantized side tuning (QST, Zhang et al. 2024): what is trained is beside the base, or LoRA in its last blocks.

Most of the base is only run forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from accessory.errors import ConfigError, ParallelError
from accessory.method.base import Attachment, Initializer, Method
from accessory.method.peft import Peft, truncated_normal
from accessory.method.side_network import SideDecoder
from accessory.method.side_settings import SideSettings, side_args
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.parallel.groups import Layout
from accessory.parallel.tensor import slicing_of

OWN = ("side.", "downsample.", "embedding_downsample.", "gates.", "side_norm.", "upsample.", "final_gate.")
"""What the names of a side network's parameters begin with."""
_PUBLISHED = {"peft_hidden_size", "alpha_r", "add_layer_norm_after_adapter", "add_layer_norm_before_adapter"}
"""Keys by which a file of the published code is recognised."""
_FREE = {"dropout", "state_bits", "tail_backward", "label_share", "alpha_r", "fan_in_fan_out"}
"""Keys without effect on what a trained side network computes."""
_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_tanh"}


class SideTuning(Method):
    """Trains the side network of a `SideDecoder`."""

    Settings = SideSettings
    suffix: ClassVar[str] = "_qst"
    also_called: ClassVar[tuple[str, ...]] = ("lst",)
    summary: ClassVar[str] = "LoRA in the last blocks or a side network, the base being run forward only"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "qst": {},
        "qst_side": {"side_layers": 1},
        "qst_8bit": {"state_bits": 8},
        "qst_released": {"start": "released"},
    }
    keeps_base: ClassVar[bool] = True

    @classmethod
    def translated(cls, content: dict[str, Any]) -> dict[str, Any]:
        """A published file's `activation` is the adapter's, under names of other libraries."""
        if "activation" not in content or not _PUBLISHED & content.keys():
            return content
        rest = {key: value for key, value in content.items() if key != "activation"}
        return {**rest, "adapter_activation": _ACTIVATIONS.get(content["activation"], content["activation"])}

    @property
    def merge_fault(self) -> str | None:
        """A tail alone is LoRA in the last blocks, which can be added to them."""
        if not self.settings.side_layers:
            return None
        return "a side network stands beside the base and changes none of its matrices, so nothing can be added to them"

    adapter_fault = merge_fault
    vision_fault = "no gradient goes through its base, and so none to what turns images into rows"

    @property
    def mergeable(self) -> Peft.Settings:
        """The tail's LoRA."""
        rank = self.settings.tail_rank
        return Peft.Settings(norm_tuning=False, bias_tuning=False, lora_rank=rank, lora_alpha=rank)

    @property
    def drops_out(self) -> bool:
        """On an adapter's input."""
        return self.settings.downsample == "adapter" and self.settings.dropout > 0

    def check(self, args: ModelArgs, layout: Layout, data_parallel: str) -> None:
        """See `Method.check`; the side network's heads and MLP are divided over the ranks as the base's are."""
        super().check(args, layout, data_parallel)
        tail = self.settings.tail_of(args.n_layers)
        if tail > args.n_layers or (tail == args.n_layers and self.settings.side_layers):
            most = args.n_layers - bool(self.settings.side_layers)
            raise ConfigError(
                f"--llama_config: 'tail' is {tail}, the base has {args.n_layers} blocks; expected {most} or less."
            )
        if not self.settings.side_layers:
            return
        narrow, ranks = side_args(args, self.settings), layout.mp_size
        counts = {"attention heads": narrow.n_heads, "key/value heads": narrow.n_kv_heads, "MLP": narrow.hidden_dim}
        if bad := [f"{count} {what}" for what, count in counts.items() if count % ranks]:
            raise ParallelError(
                f"--model_parallel_size {ranks} does not divide the side network's {', '.join(bad)}: give a side_heads "
                f"or r in --llama_config that it divides, or a smaller --model_parallel_size."
            )

    @classmethod
    def added(cls, name: str) -> bool:
        """See `Method.added`: those of a side network, too."""
        return super().added(name) or name.startswith(OWN)

    def beside(self, args: ModelArgs) -> SideTuning:
        """See `Method.beside`: tail and heads."""
        return SideTuning(self.settings.beside(args))

    def conflict(self, stated: Mapping[str, Any], args: ModelArgs) -> str | None:
        """See `Method.conflict`; how it is trained may change."""
        theirs = {key: stated[key] for key in type(self.settings).model_fields if key in stated}
        was, now = (
            settings.beside(args).model_dump(exclude=_FREE)
            for settings in (self.settings.model_copy(update=theirs), self.settings)
        )
        said = ", ".join(f"{key} {was[key]!r}, here it is {value!r}" for key, value in now.items() if was[key] != value)
        return f"was trained with {said}" if said else None

    def decoder(self, args: ModelArgs, **how: Any) -> Decoder:
        """The base with the side network."""
        return SideDecoder(args, self.settings, **how)

    def attach(self, decoder: Decoder) -> Attachment:
        """The decoder has the parameters already; they start as PyTorch's layers do, apart from gates and upsample.

        The published OPT code freezes the norm before a side block's MLP, and so does a `released` start there.
        """
        own = {name: p for name, p in decoder.named_parameters() if name.startswith(OWN) or ".lora_" in name}
        initial = {name: self._start(name, p, decoder, own) for name, p in own.items()}
        frozen = self.settings.start == "released" and decoder.args.architecture == "opt"
        kept = {name for name in own if frozen and name.startswith("side.") and ".ffn_norm." in name}
        return Attachment(set(own) - kept, initial)

    def _start(self, name: str, parameter: nn.Parameter, decoder: Decoder, own: dict[str, nn.Parameter]) -> Initializer:
        def whole(of: nn.Parameter) -> tuple[int, ...]:
            """The shape of a parameter before it was cut over model-parallel ranks."""
            return slicing_of(of).whole_shape(tuple(of.shape), decoder.ranks)

        shape, released = whole(parameter), self.settings.start == "released"
        if ".lora_" in name:
            return truncated_normal(*shape) if name.endswith("lora_a.weight") else _constant(shape, 0.0)
        if name.startswith("gates."):
            return _constant(shape, 0.5)
        if name.startswith("final_gate."):
            # The published OPT code has its sigmoid on the other side of the sum: sigmoid(-1) = 1 - sigmoid(1).
            return _constant(shape, -1.0 if released and decoder.args.architecture == "opt" else 1.0)
        if name.startswith("upsample.") and not released:
            return _constant(shape, 0.0)
        if "norm" in name:
            return _constant(shape, 0.0 if name.endswith(".bias") else 1.0)
        weight = whole(own[name.removesuffix("bias") + "weight"]) if name.endswith(".bias") else shape
        return _uniform(shape, 1 / math.sqrt(weight[1]))


def _constant(shape: tuple[int, ...], value: float) -> Callable[[torch.Generator], Tensor]:
    return lambda _generator: torch.full(shape, value)


def _uniform(shape: tuple[int, ...], bound: float) -> Callable[[torch.Generator], Tensor]:
    """As torch.nn.Linear starts: uniform within 1 / sqrt(in)."""
    return lambda generator: torch.empty(shape).uniform_(-bound, bound, generator=generator)
