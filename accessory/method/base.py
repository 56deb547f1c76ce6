"""What a method promises: it adds its parameters to a decoder and says which parameters are trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from accessory.model.decoder import Decoder

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
    trains_base: ClassVar[bool]  # then the base must be plain: packed weights have no gradient

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
