"""Architectures of image encoders: settings under Hugging Face's names, read from its config.json or from shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from accessory.errors import CheckpointError

Size = Annotated[int, Field(ge=1, le=1 << 16)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]
Activation = Literal["gelu", "quick_gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]
"""As transformers calls them."""


class Transformer(BaseModel):
    """What a stack of attention and MLP layers of one width has."""

    model_config = ConfigDict(extra="forbid")

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    hidden_act: Activation
    layer_norm_eps: Epsilon

    @model_validator(mode="after")
    def _heads_fit(self) -> Transformer:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not divide a width of {self.hidden_size}")
        return self


class VisionTransformer(Transformer):
    """A vision transformer (Dosovitskiy et al. 2021): square images cut into square patches, and a class token."""

    image_size: Size = 224
    patch_size: Size = 14

    @model_validator(mode="after")
    def _patches_fit(self) -> VisionTransformer:
        if self.image_size < self.patch_size:
            raise ValueError(f"an image of {self.image_size} pixels has no patch of {self.patch_size}")
        return self

    @property
    def tokens(self) -> int:
        """Patches of an image, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def working_numbers(self) -> int:
        """Numbers that are alive at most while one image runs through, without a gradient.

        Its pixels, and for each token a layer's input, that normalized, and either what is between the MLP's matrices,
        before and after the activation, or q, k, v, attention's result and the product with it.
        """
        inner = 3 if self.hidden_act == "quick_gelu" else 2  # which is computed in two steps
        each = 2 * self.hidden_size + max(inner * self.intermediate_size, 5 * self.hidden_size)
        return 3 * self.image_size**2 + self.tokens * each


def known_values(config: Any, kind: type[BaseModel], source: str) -> dict[str, Any]:
    """The entries of `config`, an object of a config.json, that are settings of `kind`. Raises `CheckpointError`."""
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{source}: found {config!r}; expected an object with an image encoder's settings.")
    return {key: config[key] for key in kind.model_fields if config.get(key) is not None}


def count_layers(names: Iterable[str], prefix: str) -> int:
    """How many layers the names `prefix`N... are of; 0 for none."""
    found = [int(match[1]) for name in names if (match := re.match(re.escape(prefix) + r"(\d+)\.", name))]
    return max(found, default=-1) + 1


def heads_of(width: int, head: int, source: str) -> int:
    """Number of attention heads of a published encoder, whose heads are all `head` wide. Raises `CheckpointError`."""
    if width % head:
        raise CheckpointError(
            f"{source}: its image encoder is {width} wide, and nothing says how many heads that is (published ones "
            f"have heads of {head}); give its Hugging Face directory with --vision_path."
        )
    return width // head


def shape_of(shapes: Mapping[str, tuple[int, ...]], name: str, dims: int, source: str) -> tuple[int, ...]:
    """The shape of the tensor `name`, which has so many dimensions. Raises `CheckpointError` for another, or none."""
    if name not in shapes:
        raise CheckpointError(f"{source}: {name} is missing; expected the image encoder's, of {dims} dimensions.")
    if len(shapes[name]) != dims:
        raise CheckpointError(f"{source}: {name} has shape {shapes[name]}; expected {dims} dimensions.")
    return shapes[name]


def image_size_of(patch: tuple[int, ...], positions: int, source: str) -> dict[str, int]:
    """`image_size` and `patch_size` from a patch's weights [W, 3, p, p] and the number of positions, patches and 1."""
    side = round((positions - 1) ** 0.5)
    if patch[1] != 3 or patch[2] != patch[3] or side * side != positions - 1 or side < 1:
        raise CheckpointError(
            f"{source}: patches of shape {patch[1:]} at {positions} positions make no square image of three colours."
        )
    return {"image_size": side * patch[2], "patch_size": patch[2]}
