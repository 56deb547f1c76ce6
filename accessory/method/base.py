"""What a method promises: it makes the decoder, adds its parameters to it, and says which are trained and where."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.parallel.groups import Layout

Initializer = Callable[[torch.Generator], Tensor]
"""Makes the whole (unsliced) fp32 tensor of an added parameter, the same on every layout for the same seed."""


@dataclass
class Attachment:
    """What a method did to a decoder: trained parameters by name, and how those it added start out."""

    trainable: set[str] = field(default_factory=set)
    initial: dict[str, Initializer] = field(default_factory=dict)


class Method(ABC):
    """One way of fine-tuning. `settings` holds the method's own keys of `--llama_config`."""

    Settings: ClassVar[type[BaseModel]]
    """No key of it is one of `ModelArgs`, beside which a checkpoint's `config.json` holds it."""
    suffix: ClassVar[str]
    """What `--llama_type` ends in after the family."""
    also_called: ClassVar[tuple[str, ...]] = ()
    """Words at the end of a `--llama_type` by which users of other trainers may mean it."""
    summary: ClassVar[str]
    """What is trained, in a few words."""
    presets: ClassVar[dict[str, dict[str, Any]]]
    """Names that tools take as `--method`, and the settings they stand for."""
    trains_base: ClassVar[bool] = False
    """Whether the base's own weights are trained, rather than something beside them."""
    merge_fault: ClassVar[str | None] = None
    """Why what it trained cannot be merged into the base's matrices, biases and norms; None: it can."""
    adapter_fault: ClassVar[str | None] = None
    """Why what it trained cannot be written as a PEFT adapter; None: it can."""

    @classmethod
    def storage_fault(cls, quant_type: str) -> str | None:
        """Why it cannot be trained on a base packed as `quant_type`; None: it can."""
        return None

    @classmethod
    def translated(cls, content: dict[str, Any]) -> dict[str, Any]:
        """A file of `--llama_config` in our names, where published ones call this method's keys otherwise."""
        return content

    def check(self, args: ModelArgs, layout: Layout, data_parallel: str) -> None:
        """Raise an `AccessoryError` that names the flag to change where this base or layout will not do.

        Asked before any weight is read. data_parallel: as the flag.
        """
        args.check_model_parallel(layout.mp_size)

    def decoder(self, args: ModelArgs, **how: Any) -> Decoder:
        """The decoder to be filled, on the meta device; `how` is all that `Decoder` takes beside the settings."""
        return Decoder(args, **how)

    @property
    def trains_vocabulary(self) -> bool:
        """Whether the rows of the embedding are learned."""
        return self.trains_base

    @property
    def drops_out(self) -> bool:
        """Whether training drops values out, of each document's tokens others."""
        return False

    def __init__(self, settings: BaseModel) -> None:
        self.settings = settings

    def conflict(self, stated: Mapping[str, Any]) -> str | None:
        """Why a part trained with the settings `stated` would compute something else with these; None if it would not.

        Shapes are compared elsewhere.
        """
        return None

    @abstractmethod
    def attach(self, decoder: Decoder) -> Attachment:
        """Add parameters (on the meta device, fp32) to `decoder` and choose what is trained."""
