"""The interface of an image encoder: its modules on a decoder, their names elsewhere, and what they compute.

The encoder itself is frozen. A projection behind it, to the decoder's width, may be trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from accessory.data.pictures import PicturePlace
from accessory.errors import CheckpointError, ConfigError, explain_validation
from accessory.model.decoder import Decoder
from accessory.quant import PackedWeight
from accessory.vision.start import Initializer

IMAGES_AT_A_TIME = 8
"""Images that run through an encoder together, so that its activations take little memory however many there are."""


class Unread(Protocol):
    """A tensor of a checkpoint that is not read yet."""

    shape: tuple[int, ...]

    def select(self, rows: Tensor) -> Any:
        """The tensor of its `rows`, int64."""

    def transposed(self) -> Any:
        """The transpose of a matrix."""


class Vision(ABC):
    """One kind of image encoder; `settings` holds its architecture."""

    name: ClassVar[str]
    Settings: ClassVar[type[BaseModel]]
    key: ClassVar[str]
    """Under which a checkpoint's config.json holds the settings."""
    model_types: ClassVar[tuple[str, ...]]
    """`model_type` of Hugging Face directories that hold one."""
    encoder: ClassVar[str]
    """Name of the module on the decoder that is frozen always."""
    projection: ClassVar[tuple[str, ...]]
    """Names of the modules and parameters on the decoder behind it, some of which may be trained."""

    def __init__(self, settings: BaseModel) -> None:
        self.settings = settings

    @property
    @abstractmethod
    def place(self) -> PicturePlace:
        """How a picture stands in a packed document."""

    @property
    @abstractmethod
    def feature_shape(self) -> tuple[int, int]:
        """(tokens, width) of an image's features."""

    @property
    @abstractmethod
    def inner_tokens(self) -> int:
        """Tokens of an image inside the encoder: the most that its matrices are multiplied with."""

    @property
    @abstractmethod
    def working_numbers(self) -> int:
        """Numbers that are alive at most while one image runs through the encoder, without the features."""

    def working_bytes(self, images: int, dtype: torch.dtype) -> int:
        """Bytes that `features` of so many images takes beside the weights and an unpacked matrix, with its result."""
        tokens, width = self.feature_shape
        running = min(images, IMAGES_AT_A_TIME) * self.working_numbers
        return (running + images * tokens * width) * dtype.itemsize

    @classmethod
    def owns(cls, name: str) -> bool:
        """Whether a tensor called `name` in a checkpoint of a whole model belongs to it, needless ones included."""
        return name.split(".", 1)[0] in (cls.encoder, *cls.projection)

    @classmethod
    def of_settings(cls, values: Mapping[str, Any], source: str) -> Self:
        """The encoder with settings as `source` has them. Raises `CheckpointError` naming each wrong one."""
        try:
            return cls(cls.Settings(**values))
        except ValidationError as error:
            raise CheckpointError(explain_validation(error, source, cls.Settings.model_fields)) from error

    @classmethod
    @abstractmethod
    def of_directory(cls, config: Mapping[str, Any], source: str) -> Self:
        """The encoder that a Hugging Face config.json describes. Raises `CheckpointError`."""

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Unread], source: str) -> Self:
        """The encoder whose tensors, by our names, stand in a checkpoint without its settings.

        Raises `CheckpointError` where their shapes do not tell; by default they do not.
        """
        raise CheckpointError(f"{source}: nothing says how its image encoder is built; give --vision_path.")

    @classmethod
    @abstractmethod
    def from_directory(cls, tensors: Mapping[str, Unread]) -> dict[str, Any]:
        """The encoder's tensors in a Hugging Face directory by our names; what it does not use is left out."""

    @classmethod
    def from_checkpoint(cls, tensors: Mapping[str, Unread]) -> dict[str, Any]:
        """The tensors that it `owns` in a whole model's checkpoint, upstream's or ours, by our names.

        What it does not use is left out; a name that means nothing to us is kept as it is.
        """
        return {name: tensor for name, tensor in tensors.items() if cls.owns(name)}

    @abstractmethod
    def attach(
        self, decoder: Decoder, dtype: torch.dtype, storage: type[PackedWeight] | None
    ) -> dict[str, Initializer]:
        """Register modules and parameters on `decoder`, on meta, frozen, in `dtype`; linears packed as `storage`.

        Returns how those of the projection start where no checkpoint has them. Raises `ConfigError` where transformers
        is not installed.
        """

    def place_buffers(self, decoder: Decoder, device: torch.device) -> None:  # noqa: B027 (most have none)
        """Make the buffers that no checkpoint holds, on `device`."""

    def features(self, decoder: Decoder, pixels: Tensor) -> Tensor:
        """Normalized images [n, 3, size, size] -> their features [n, tokens, width] in the encoder's dtype and device.

        No gradient; a few images at a time.
        """
        encoder, like = getattr(decoder, self.encoder), self.plain_weight(decoder)
        found = torch.empty((len(pixels), *self.feature_shape), dtype=like.dtype, device=like.device)
        with torch.no_grad():
            for start in range(0, len(pixels), IMAGES_AT_A_TIME):
                chunk = pixels[start : start + IMAGES_AT_A_TIME].to(like.device, like.dtype)
                found[start : start + len(chunk)] = self.encode(encoder, chunk)
        return found

    def plain_weight(self, decoder: Decoder) -> Tensor:
        """A parameter of the encoder that is not packed: it is in the dtype that the encoder computes in."""
        modules = getattr(decoder, self.encoder).modules()
        return next(p for m in modules if not isinstance(m, PackedWeight) for p in m.parameters(recurse=False))

    @abstractmethod
    def encode(self, encoder: nn.Module, pixels: Tensor) -> Tensor:
        """`features` of all images at once, in the encoder's dtype and on its device."""

    @abstractmethod
    def rows(self, decoder: Decoder, features: Tensor) -> Tensor:
        """Features [n, tokens, width] -> [n, place.rows, embedding_dim] in the decoder's dtype, with a gradient."""


def missing_extra(error: ImportError) -> ConfigError:
    """What to raise where an image encoder's library cannot be imported."""
    return ConfigError(f"Images need transformers and Pillow ({error}): pip install -e '.[vision]'.")
