"""BLIP-2's vision transformer and Q-Former (Li et al. 2023): an image becomes 32 rows between two learned tags.

The modules are transformers'; names and rows are those of LLaMA2-Accessory's llama_qformerv2.
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
from accessory.parallel.tensor import WHOLE, mark
from accessory.quant import PackedWeight
from accessory.vision.base import Unread, Vision, missing_extra
from accessory.vision.frozen_linear import on_meta, pack_linears
from accessory.vision.settings import (
    Activation,
    Epsilon,
    Size,
    Transformer,
    VisionTransformer,
    count_layers,
    heads_of,
    image_size_of,
    known_values,
    shape_of,
)
from accessory.vision.start import Initializer, linear_start, norm_start, uniform

NORM_EPS = 1e-5
"""Of the norm behind the projection: torch's default, which LLaMA2-Accessory has."""
_USED = re.compile(
    r"query_tokens|vision_model\.|qformer\.(?!embeddings\.|encoder\.layer\.\d+\.(intermediate|output)\.)"
)
"""Beginnings of names in a directory, without what only text goes through."""
_TAGS = ("start_img", "end_img")
"""Learned rows before and behind the queries' results."""
_NEEDLESS = ("qformer.language_model.", "qformer.language_projection.")


class BlipTransformer(VisionTransformer):
    """Its vision transformer; the defaults are the published one's."""

    hidden_size: Size = 1408
    intermediate_size: Size = 6144
    num_hidden_layers: Size = 39
    num_attention_heads: Size = 16
    hidden_act: Activation = "gelu"
    layer_norm_eps: Epsilon = 1e-6
    qkv_bias: bool = True


class QueryTransformer(Transformer):
    """Its Q-Former; the defaults are the published one's."""

    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Size = 12
    num_attention_heads: Size = 12
    hidden_act: Activation = "gelu"
    layer_norm_eps: Epsilon = 1e-12
    cross_attention_frequency: Size = 2


class QFormer(Vision):
    """A picture's rows stand behind BOS: [start_img] [32 queries' results, projected] [end_img]."""

    class Settings(BaseModel):
        """The encoder's architecture."""

        model_config = ConfigDict(extra="forbid")

        vision_config: BlipTransformer = Field(default_factory=BlipTransformer)
        qformer_config: QueryTransformer = Field(default_factory=QueryTransformer)
        num_query_tokens: Size = 32

    name: ClassVar[str] = "qformerv2"
    key: ClassVar[str] = "blip2"
    model_types: ClassVar[tuple[str, ...]] = ("blip-2",)
    encoder: ClassVar[str] = "qformer"
    projection: ClassVar[tuple[str, ...]] = ("qformer_proj", *_TAGS)

    @property
    def place(self) -> PicturePlace:
        """See `Vision.place`."""
        rows, size = self.settings.num_query_tokens + 2, self.settings.vision_config.image_size
        return PicturePlace(rows=rows, size=size, before_start=False)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """See `Vision.feature_shape`."""
        return self.settings.num_query_tokens, self.settings.qformer_config.hidden_size

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
        """See `Vision.of_directory`."""
        parts = {"vision_config": BlipTransformer, "qformer_config": QueryTransformer}
        values = {key: known_values(config.get(key) or {}, kind, source) for key, kind in parts.items()}
        return cls.of_settings(values | known_values({**config, **values}, cls.Settings, source), source)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Unread], source: str) -> Self:
        """See `Vision.of_tensors`. Heads are 88 wide in the vision transformer and 64 in the Q-Former, as published."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        eyes, queries = "qformer.vision_model.", "qformer.qformer.encoder.layer."
        layer = f"{eyes}encoder.layers.0."
        patch = shape_of(shapes, f"{eyes}embeddings.patch_embedding.weight", 4, source)
        positions = shape_of(shapes, f"{eyes}embeddings.position_embedding", 3, source)[1]
        tokens = shape_of(shapes, "qformer.query_tokens", 3, source)
        crossing = [n for n in range(1, count_layers(shapes, queries))
                    if f"{queries}{n}.crossattention.attention.query.weight" in shapes]  # fmt: skip
        vision = image_size_of(patch, positions, source) | {
            "hidden_size": patch[0],
            "intermediate_size": shape_of(shapes, f"{layer}mlp.fc1.weight", 2, source)[0],
            "num_hidden_layers": count_layers(shapes, f"{eyes}encoder.layers."),
            "num_attention_heads": heads_of(patch[0], 88, source),
            "qkv_bias": f"{layer}self_attn.qkv.bias" in shapes,
        }
        qformer = {
            "hidden_size": tokens[2],
            "intermediate_size": shape_of(shapes, f"{queries}0.intermediate_query.dense.weight", 2, source)[0],
            "num_hidden_layers": count_layers(shapes, queries),
            "num_attention_heads": heads_of(tokens[2], 64, source),
            "cross_attention_frequency": crossing[0] if crossing else count_layers(shapes, queries),
        }
        values = {"vision_config": vision, "qformer_config": qformer, "num_query_tokens": tokens[1]}
        return cls.of_settings(values, source)

    @classmethod
    def from_directory(cls, tensors: Mapping[str, Unread]) -> dict[str, Any]:
        """See `Vision.from_directory`."""
        return {f"qformer.{name}": tensor for name, tensor in tensors.items() if _USED.match(name)}

    @classmethod
    def from_checkpoint(cls, tensors: Mapping[str, Unread]) -> dict[str, Any]:
        """See `Vision.from_checkpoint`: ours are upstream's names."""
        return {name: tensor for name, tensor in tensors.items() if cls.owns(name) and not name.startswith(_NEEDLESS)}

    def attach(
        self, decoder: Decoder, dtype: torch.dtype, storage: type[PackedWeight] | None
    ) -> dict[str, Initializer]:
        """See `Vision.attach`."""
        width, dim = self.feature_shape[1], decoder.args.embedding_dim
        decoder.qformer = Blip2Encoder(self.settings, dtype)
        if storage:
            pack_linears(decoder.qformer, storage)
        decoder.qformer_proj = nn.Sequential(Projection(width, dim, dtype, bias=True), LayerNorm(dim, NORM_EPS))
        for tag in _TAGS:
            blank = torch.empty(1, 1, dim, dtype=dtype, device="meta")
            decoder.register_parameter(tag, mark(nn.Parameter(blank), WHOLE))
        for part in self.projection:
            getattr(decoder, part).requires_grad_(False)
        tags = dict.fromkeys(_TAGS, uniform((1, 1, dim), 0.0, 1.0))
        return linear_start("qformer_proj.0", dim, width) | norm_start("qformer_proj.1", dim) | tags

    def encode(self, encoder: nn.Module, pixels: Tensor) -> Tensor:
        """See `Vision.encode`."""
        return encoder(pixels)

    def rows(self, decoder: Decoder, features: Tensor) -> Tensor:
        """See `Vision.rows`."""
        count, dim = len(features), decoder.args.embedding_dim
        projected = decoder.qformer_proj(features.to(decoder.dtype).flatten(0, 1))
        start, end = (getattr(decoder, tag).to(decoder.dtype).expand(count, 1, dim) for tag in _TAGS)
        return torch.cat((start, projected.view(count, features.shape[1], dim), end), 1)


class Blip2Encoder(nn.Module):
    """transformers' two transformers and the queries between them, on meta, frozen, without dropout."""

    def __init__(self, settings: QFormer.Settings, dtype: torch.dtype) -> None:
        super().__init__()
        try:
            from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig, Blip2VisionConfig
            from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2VisionModel
        except ImportError as error:
            raise missing_extra(error) from error
        eyes, width = settings.vision_config, settings.qformer_config.hidden_size
        without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        reading = {**settings.qformer_config.model_dump(), "encoder_hidden_size": eyes.hidden_size}
        self.vision_model = on_meta(Blip2VisionModel, Blip2VisionConfig(**eyes.model_dump()), dtype)
        self.qformer = on_meta(Blip2QFormerModel, Blip2QFormerConfig(**reading, **without_dropout), dtype)
        queries = torch.empty(1, settings.num_query_tokens, width, dtype=dtype, device="meta")
        self.query_tokens = nn.Parameter(queries, requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Images [n, 3, size, size] -> what the queries found there [n, queries, width]."""
        seen = self.vision_model(pixels).last_hidden_state
        queries = self.query_tokens.expand(len(seen), -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
