"""CLIP as LLaMA-Adapter v2 has it: a picture takes no rows of the sequence, but is added to its document's prefix.

Learned queries and CLIP's tokens go through transformer blocks together; what becomes of the queries is projected to
the decoder's width. Names and formulas are LLaMA2-Accessory's, whose blocks are timm's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor, nn

from accessory.data.pictures import PicturePlace
from accessory.model.decoder import Decoder, Projection
from accessory.model.norm import LayerNorm
from accessory.parallel.tensor import WHOLE, mark
from accessory.quant import PackedWeight
from accessory.vision.clip import NORM_EPS, Clip
from accessory.vision.start import Initializer, linear_start, norm_start


class ClipPrefix(Clip):
    """`rows` gives what is added to the `length` rows of a document's prefix.

    width: of the blocks. depth: how many there are. heads: of their attention. ratio: of their MLP's width to theirs.
    """

    projection: ClassVar[tuple[str, ...]] = (
        *("clip_proj", "clip_proj_norm"),
        *("visual_query", "visual_blocks", "visual_proj", "visual_proj_norm"),
    )

    def __init__(
        self, settings: BaseModel, *, length: int, width: int = 768, depth: int = 8, heads: int = 16, ratio: float = 4.0
    ) -> None:
        super().__init__(settings)
        self.length, self.width, self.depth, self.heads, self.ratio = length, width, depth, heads, ratio

    @property
    def place(self) -> PicturePlace:
        """See `Vision.place`."""
        return replace(super().place, rows=0)

    def attach(
        self, decoder: Decoder, dtype: torch.dtype, storage: type[PackedWeight] | None
    ) -> dict[str, Initializer]:
        """See `Vision.attach`."""
        super().attach(decoder, dtype, storage)
        width, seen, wide = self.width, self.feature_shape[1], decoder.args.dim
        decoder.clip_proj = Projection(seen, width, dtype, bias=True)
        decoder.clip_proj_norm = LayerNorm(width, NORM_EPS)
        query = torch.empty(self.length, width, dtype=dtype, device="meta")
        decoder.visual_query = mark(nn.Parameter(query), WHOLE)
        decoder.visual_blocks = nn.ModuleList(
            VisualBlock(width, self.heads, int(width * self.ratio), dtype) for _ in range(self.depth)
        )
        decoder.visual_proj = Projection(width, wide, dtype, bias=True)
        decoder.visual_proj_norm = LayerNorm(wide, NORM_EPS)
        starts: dict[str, Initializer] = {
            "visual_query": lambda generator: torch.randn(self.length, width, generator=generator)
        }
        for name in self.projection:
            part = getattr(decoder, name)
            part.requires_grad_(False)
            for inner, module in part.named_modules(prefix=name) if isinstance(part, nn.Module) else ():
                if isinstance(module, Projection):
                    starts |= linear_start(inner, *module.weight.shape)
                elif isinstance(module, LayerNorm):
                    starts |= norm_start(inner, len(module.weight))
        return starts

    def rows(self, decoder: Decoder, features: Tensor) -> Tensor:
        """Features [n, tokens, width] -> what is added to prefixes [n, length, D], with a gradient."""
        count = len(features)
        seen = decoder.clip_proj_norm(decoder.clip_proj(features.to(decoder.dtype).flatten(0, 1)))
        queries = decoder.visual_query.to(decoder.dtype).expand(count, -1, -1)
        x = torch.cat([queries, seen.view(count, features.shape[1], self.width)], 1)
        for block in decoder.visual_blocks:
            x = block(x)
        made = decoder.visual_proj_norm(decoder.visual_proj(x[:, : self.length].flatten(0, 1)))
        return made.view(count, self.length, decoder.args.dim)


class VisualBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), over all tokens of an image: timm's block, by its names."""

    def __init__(self, width: int, heads: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width, NORM_EPS), LayerNorm(width, NORM_EPS)
        self.heads, self.attn, self.mlp = heads, nn.Module(), nn.Module()
        self.attn.qkv = Projection(width, 3 * width, dtype, bias=True)
        self.attn.proj = Projection(width, width, dtype, bias=True)
        self.mlp.fc1 = Projection(width, inner, dtype, bias=True)
        self.mlp.fc2 = Projection(inner, width, dtype, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, tokens, width] -> the same shape."""
        n, tokens, width = x.shape
        flat = x.flatten(0, 1)
        qkv = self.attn.qkv(self.norm1(flat)).view(n, tokens, 3, self.heads, width // self.heads)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        flat = flat + self.attn.proj(attended.transpose(1, 2).reshape(n * tokens, width))
        return (flat + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(flat))))).view(n, tokens, width)
