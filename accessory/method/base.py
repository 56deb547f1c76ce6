"""The interface of a method: it makes the decoder, adds its parameters, and says what is trained and allowed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.parallel.groups import Layout
from accessory.parallel.tensor import Slicing
from accessory.quant import PackedWeight, storage
from accessory.vision import Vision

Initializer = Callable[[torch.Generator], Tensor]
"""Makes the whole (unsliced) fp32 tensor of an added parameter, the same on every layout for the same seed."""


@dataclass
class Attachment:
    """What a method did to a decoder: names of trained parameters, and initializers of those it added."""

    trainable: set[str] = field(default_factory=set)
    initial: dict[str, Initializer] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)
    """Names of what training changes though it has no gradient: it is saved with what is trained."""
    working: dict[str, Slicing] = field(default_factory=dict)
    """Name -> how it is cut, of parameters that only training needs: no checkpoint has them."""


@dataclass(frozen=True)
class IntegerRule:
    """How whole numbers of packed weights move: see `accessory.run.integer_moves`.

    gated: by tried moves; else by the released rule, rounding after each step. most_moved: share of a matrix's numbers
    that may move at a time. every: steps from one proposal to the next. basis_every: steps a basis is kept for. scale:
    of displacements.
    """

    gated: bool
    most_moved: float
    every: int
    basis_every: int
    scale: float


class Method(ABC):
    """One way of fine-tuning. `settings` holds the method's own keys of `--llama_config`."""

    Settings: ClassVar[type[BaseModel]]
    """No key may be one of `ModelArgs`: a checkpoint's `config.json` holds both."""
    suffix: ClassVar[str]
    """What `--llama_type` ends in after the family."""
    also_called: ClassVar[tuple[str, ...]] = ()
    """Other endings of `--llama_type` by which users of other trainers may call it."""
    summary: ClassVar[str]
    """What is trained, in a few words."""
    presets: ClassVar[dict[str, dict[str, Any]]]
    """Names that tools take as `--method`, and the settings they stand for."""
    beside_flags: ClassVar[Mapping[str, dict[str, Any]]] = {}
    """Key that a flag states -> what other keys are then where nothing states them."""
    trains_base: ClassVar[bool] = False
    """Whether the base's own weights are trained, rather than something beside them."""
    keeps_base: ClassVar[bool] = False
    """Whether no gradient goes through the base, so that its states can be cached (`accessory.memory.base_cache`)."""
    merge_fault: ClassVar[str | None] = None
    """Why what it trained cannot be merged into the base's matrices, biases and norms; None: it can."""
    adapter_fault: ClassVar[str | None] = None
    """Why what it trained cannot be written as a PEFT adapter; None: it can."""
    vision_fault: ClassVar[str | None] = None
    """Why it cannot train a model that sees images; None: it can."""
    sees_by_clip: ClassVar[bool] = False
    """Whether no image encoder but CLIP goes with it."""

    @classmethod
    def storage_fault(cls, quant_type: str) -> str | None:
        """Why it cannot be trained on a base packed as `quant_type`; None: it can."""
        return f"it leaves untrained what {quant_type} is there to train" if storage(quant_type).trained else None

    @classmethod
    def tunes(cls, kind: type[PackedWeight]) -> bool:
        """Whether it trains parts of matrices that are packed as `kind`."""
        return bool(kind.trained)

    def storage_of(self, kind: type[PackedWeight]) -> type[PackedWeight]:
        """How matrices lie in memory that the base has as `kind`: in another form where it trains what those freeze."""
        return kind

    @classmethod
    def translated(cls, content: dict[str, Any]) -> dict[str, Any]:
        """The content of a `--llama_config` file, with other published names of this method's keys replaced by ours."""
        return content

    def check(self, args: ModelArgs, layout: Layout, data_parallel: str) -> None:
        """Raise an `AccessoryError` that names the flag to change where this base or layout is not supported.

        Called before any weight is read. data_parallel: as the flag.
        """
        args.check_model_parallel(layout.mp_size)

    def decoder(self, args: ModelArgs, **how: Any) -> Decoder:
        """The decoder, on the meta device; `how`: the other arguments of `Decoder`."""
        return Decoder(args, **how)

    @property
    def mergeable(self) -> BaseModel:
        """Settings of `Peft` that describe what it trained, for merging and PEFT adapters, where no fault forbids."""
        return self.settings

    @property
    def trains_vocabulary(self) -> bool:
        """Whether the rows of the embedding are learned."""
        return self.trains_base

    @property
    def drops_out(self) -> bool:
        """Whether training uses dropout, so that equal tokens of two documents give different results."""
        return False

    @property
    def integer_rule(self) -> IntegerRule | None:
        """How whole numbers of packed weights move; None: they stay."""
        return None

    def __init__(self, settings: BaseModel) -> None:
        self.settings = settings

    def has_lora(self, linear: str) -> bool:
        """Whether `attach` puts LoRA on the linear of that name."""
        return False

    @classmethod
    def added(cls, name: str) -> bool:
        """Whether the tensor of that name in a trained part is one that the settings say how to compute with."""
        return ".lora_" in name

    def beside(self, args: ModelArgs) -> Method:
        """This method, with settings that follow from a base of `args` spelled out, as they are to be saved."""
        return self

    def conflict(self, stated: Mapping[str, Any], args: ModelArgs) -> str | None:
        """Why a part trained with the settings `stated` would compute differently with these; None if it would not.

        args: those of the base. Shapes are compared elsewhere.
        """
        return None

    def prepare_training(self, decoder: Decoder, attachment: Attachment) -> None:  # noqa: B027 (most need nothing)
        """Add to a decoder it is attached to (on the meta device) what only training needs, and to `attachment`."""

    def sees(self, vision: Vision) -> Vision:
        """How images enter a model that it trains, which has the encoder `vision`; by default as that says."""
        return vision

    def trains_of_vision(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether it trains this parameter of those between an image encoder, which is frozen, and the embeddings."""
        return self.trains_base

    def rates(self, decoder: Decoder, lr: float) -> dict[str, float]:
        """Name -> what the learning rate `lr` is multiplied by for it, where that is not 1. A collective.

        decoder: with its weights in place.
        """
        return {}

    @abstractmethod
    def attach(self, decoder: Decoder) -> Attachment:
        """Add parameters (on the meta device, fp32) to `decoder` and choose what is trained."""
