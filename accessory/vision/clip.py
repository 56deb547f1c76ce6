"""CLIP's image encoder (Radford et al. 2021): class token and patches of an image become rows before BOS.

The modules are transformers'; LLaMA2-Accessory holds open_clip's, whose names are translated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from accessory.data.pictures import PicturePlace
from accessory.model.decoder import Decoder, Projection
from accessory.model.norm import LayerNorm
from accessory.quant import PackedWeight
from accessory.vision.base import Unread, Vision, missing_extra
from accessory.vision.frozen_linear import on_meta, pack_linears
from accessory.vision.settings import (
    Activation,
    Epsilon,
    Size,
    VisionTransformer,
    count_layers,
    heads_of,
    image_size_of,
    known_values,
    shape_of,
)
from accessory.vision.start import Initializer, linear_start, norm_start

NORM_EPS = 1e-5
"""Of the norm behind the projection: torch's default, which LLaMA2-Accessory has."""
_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
             "patch_size": 32, "projection_dim": 512}  # fmt: skip
"""What transformers takes where a config.json is silent."""
_USED = re.compile(r"vision_model\.(?!embeddings\.position_ids)|visual_projection\.")
_TEXT = re.compile(
    r"clip\.(transformer\.|token_embedding\.|positional_embedding|ln_final\.|text_projection|logit_|attn_mask|"
    r"text_model\.)"
)
_OUTER = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight", "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight", "ln_post.bias": "post_layernorm.bias",
}  # fmt: skip
"""open_clip's name under `visual` -> transformers' under `vision_model`."""
_INNER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
"""The same of a layer's modules."""


class ClipTransformer(VisionTransformer):
    """Its vision transformer; the defaults are those of OpenAI's ViT-L/14."""

    hidden_size: Size = 1024
    intermediate_size: Size = 4096
    num_hidden_layers: Size = 24
    num_attention_heads: Size = 16
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    projection_dim: Size = 768


class Clip(Vision):
    """A picture's rows stand before BOS: the class token's and one for each patch, projected."""

    class Settings(BaseModel):
        """The encoder's architecture."""

        model_config = ConfigDict(extra="forbid")

        vision_config: ClipTransformer = Field(default_factory=ClipTransformer)

    name: ClassVar[str] = "clip"
    key: ClassVar[str] = "clip"
    model_types: ClassVar[tuple[str, ...]] = ("clip", "clip_vision_model")
    encoder: ClassVar[str] = "clip"
    projection: ClassVar[tuple[str, ...]] = ("clip_proj", "clip_proj_norm")

    @classmethod
    def owns(cls, name: str) -> bool:
        """See `Vision.owns`: what `ClipPrefix` has behind it, too."""
        return super().owns(name) or name.startswith("visual_")

    @property
    def place(self) -> PicturePlace:
        """See `Vision.place`."""
        vision = self.settings.vision_config
        return PicturePlace(rows=vision.tokens, size=vision.image_size, before_start=True)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """See `Vision.feature_shape`."""
        return self.settings.vision_config.tokens, self.settings.vision_config.projection_dim

    @property
    def inner_tokens(self) -> int:
        """See `Vision.inner_tokens`."""
        return self.settings.vision_config.tokens

    @property
    def working_numbers(self) -> int:
        """See `Vision.working_numbers`."""
        return self.settings.vision_config.working_numbers

    @classmethod
    def of_directory(cls, config: Mapping[str, Any], source: str) -> Self:
        """See `Vision.of_directory`: of the whole CLIP, or of its image encoder with the projection."""
        whole = config.get("model_type") == "clip"
        stated = {} if whole else known_values(config, ClipTransformer, source)
        if whole:
            for key in ("vision_config", "vision_config_dict"):  # the second, in old files, overrides the first
                stated |= known_values(config.get(key) or {}, ClipTransformer, source)
            stated["projection_dim"] = config.get("projection_dim", _DEFAULTS["projection_dim"])
        return cls.of_settings({"vision_config": _DEFAULTS | stated}, source)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Unread], source: str) -> Self:
        """See `Vision.of_tensors`. Heads are 64 wide, as in all that are published."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        eyes = "clip.vision_model."
        patch = shape_of(shapes, f"{eyes}embeddings.patch_embedding.weight", 4, source)
        positions = shape_of(shapes, f"{eyes}embeddings.position_embedding.weight", 2, source)[0]
        values = image_size_of(patch, positions, source) | {
            "hidden_size": patch[0],
            "intermediate_size": shape_of(shapes, f"{eyes}encoder.layers.0.mlp.fc1.weight", 2, source)[0],
            "num_hidden_layers": count_layers(shapes, f"{eyes}encoder.layers."),
            "num_attention_heads": heads_of(patch[0], 64, source),
            "projection_dim": shape_of(shapes, "clip.visual_projection.weight", 2, source)[0],
        }
        return cls.of_settings({"vision_config": values}, source)

    @classmethod
    def from_directory(cls, tensors: Mapping[str, Unread]) -> dict[str, Any]:
        """See `Vision.from_directory`."""
        return {f"clip.{name}": tensor for name, tensor in tensors.items() if _USED.match(name)}

    @classmethod
    def from_checkpoint(cls, tensors: Mapping[str, Unread]) -> dict[str, Any]:
        """See `Vision.from_checkpoint`."""
        found: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if cls.owns(name) and not _TEXT.match(name):
                found |= _translated(name, tensor)
        return found

    def attach(
        self, decoder: Decoder, dtype: torch.dtype, storage: type[PackedWeight] | None
    ) -> dict[str, Initializer]:
        """See `Vision.attach`; CLIP's own last projection stays plain."""
        try:
            from transformers.models.clip.configuration_clip import CLIPVisionConfig
            from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection
        except ImportError as error:
            raise missing_extra(error) from error
        width, dim = self.feature_shape[1], decoder.args.embedding_dim
        config = CLIPVisionConfig(**self.settings.vision_config.model_dump())
        decoder.clip = on_meta(CLIPVisionModelWithProjection, config, dtype)
        if storage:
            pack_linears(decoder.clip, storage, plain=("visual_projection",))
        decoder.clip_proj = Projection(width, dim, dtype, bias=True).requires_grad_(False)
        decoder.clip_proj_norm = LayerNorm(dim, NORM_EPS).requires_grad_(False)
        return linear_start("clip_proj", dim, width) | norm_start("clip_proj_norm", dim)

    def place_buffers(self, decoder: Decoder, device: torch.device) -> None:
        """See `Vision.place_buffers`: the positions' numbers."""
        positions = torch.arange(self.settings.vision_config.tokens, device=device)
        decoder.clip.vision_model.embeddings.position_ids = positions[None]

    def encode(self, encoder: nn.Module, pixels: Tensor) -> Tensor:
        """See `Vision.encode`: the last norm and the projection apply to every token, not to the class token alone."""
        eyes = encoder.vision_model
        return encoder.visual_projection(eyes.post_layernorm(eyes(pixels).last_hidden_state))

    def rows(self, decoder: Decoder, features: Tensor) -> Tensor:
        """See `Vision.rows`."""
        flat = decoder.clip_proj(features.to(decoder.dtype).flatten(0, 1))
        return decoder.clip_proj_norm(flat).view(*features.shape[:2], decoder.args.embedding_dim)


def _translated(name: str, tensor: Unread) -> dict[str, Any]:
    """A tensor by open_clip's name -> transformers' name and tensor, three of them for a fused one."""
    theirs = name.removeprefix("clip.visual.")
    if theirs == name:
        return {name: tensor}
    if theirs == "proj":
        return {"clip.visual_projection.weight": tensor.transposed()}
    if theirs in _OUTER:
        return {f"clip.vision_model.{_OUTER[theirs]}": tensor}
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(?:(attn\.in_proj)_|(.+)\.)(weight|bias)", theirs)
    if not found or (found[3] and found[3] not in _INNER):
        return {name: tensor}
    layer = f"clip.vision_model.encoder.layers.{found[1]}."
    if found[3]:
        return {f"{layer}{_INNER[found[3]]}.{found[4]}": tensor}
    thirds = torch.arange(tensor.shape[0]).chunk(3)
    return {f"{layer}self_attn.{part}_proj.{found[4]}": tensor.select(rows)
            for part, rows in zip("qkv", thirds, strict=True)}  # fmt: skip
