"""The encoders written out in float64, from the papers, over tensors by the names of Hugging Face's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = Mapping[str, Tensor]


def blip2(tensors: Tensors, pixels: Tensor, *, heads: int, query_heads: int, layers: int, query_layers: int) -> Tensor:
    """Images -> what BLIP-2's queries found: [n, queries, width]; every second layer of the Q-Former looks."""
    seen = _vision(
        _under(tensors, "vision_model"), pixels, layers, 1e-6, lambda layer, x: _fused(layer, x, heads), F.gelu
    )
    seen = _norm(_under(tensors, "vision_model"), "post_layernorm", seen, 1e-6)
    x = _norm(
        _under(tensors, "qformer"), "layernorm", tensors["query_tokens"].double().expand(len(pixels), -1, -1), 1e-12
    )
    for number in range(query_layers):
        layer = _under(tensors, f"qformer.encoder.layer.{number}")
        x = _bert_attention(_under(layer, "attention"), x, x, query_heads)
        if number % 2 == 0:
            x = _bert_attention(_under(layer, "crossattention"), x, seen, query_heads)
        hidden = F.gelu(_linear(layer, "intermediate_query.dense", x))
        x = _norm(layer, "output_query.LayerNorm", x + _linear(layer, "output_query.dense", hidden), 1e-12)
    return x


def clip(tensors: Tensors, pixels: Tensor, *, heads: int, layers: int) -> Tensor:
    """Images -> CLIP's projection of every token: [n, tokens, projection]."""
    eyes = _under(tensors, "vision_model")
    x = _vision(eyes, pixels, layers, 1e-5, lambda layer, x: _split(layer, x, heads), _quick_gelu)
    return _norm(eyes, "post_layernorm", x, 1e-5) @ tensors["visual_projection.weight"].double().t()


def projected(weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, features: Tensor) -> Tensor:
    """Features -> rows of the model's width: a linear and a LayerNorm."""
    x = features @ weight.t() + bias
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x * norm_weight + norm_bias


def _vision(
    eyes: Tensors, pixels: Tensor, layers: int, eps: float, attend: Callable, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """A pre-norm vision transformer, without its last norm."""
    kernel = eyes["embeddings.patch_embedding.weight"].double()
    patch, width = kernel.shape[-1], kernel.shape[0]
    n, colours, side, _ = pixels.shape
    cut = pixels.double().view(n, colours, side // patch, patch, side // patch, patch).permute(0, 2, 4, 1, 3, 5)
    x = cut.reshape(n, -1, colours * patch * patch) @ kernel.view(width, -1).t()
    if "embeddings.patch_embedding.bias" in eyes:
        x = x + eyes["embeddings.patch_embedding.bias"].double()
    positions = eyes.get("embeddings.position_embedding", eyes.get("embeddings.position_embedding.weight"))
    first = eyes["embeddings.class_embedding"].double().view(1, 1, width).expand(n, 1, width)
    x = torch.cat((first, x), 1) + positions.double().view(1, -1, width)
    if "pre_layrnorm.weight" in eyes:
        x = _norm(eyes, "pre_layrnorm", x, eps)
    for number in range(layers):
        layer = _under(eyes, f"encoder.layers.{number}")
        x = x + attend(layer, _norm(layer, "layer_norm1", x, eps))
        x = x + _linear(layer, "mlp.fc2", activation(_linear(layer, "mlp.fc1", _norm(layer, "layer_norm2", x, eps))))
    return x


def _fused(layer: Tensors, x: Tensor, heads: int) -> Tensor:
    q, k, v = _linear(layer, "self_attn.qkv", x).chunk(3, -1)
    return _linear(layer, "self_attn.projection", _attention(q, k, v, heads))


def _split(layer: Tensors, x: Tensor, heads: int) -> Tensor:
    q, k, v = (_linear(layer, f"self_attn.{part}_proj", x) for part in "qkv")
    return _linear(layer, "self_attn.out_proj", _attention(q, k, v, heads))


def _bert_attention(part: Tensors, x: Tensor, seen: Tensor, heads: int) -> Tensor:
    q = _linear(part, "attention.query", x)
    k, v = (_linear(part, f"attention.{name}", seen) for name in ("key", "value"))
    return _norm(part, "output.LayerNorm", x + _linear(part, "output.dense", _attention(q, k, v, heads)), 1e-12)


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, v))
    weights = torch.einsum("nqhe,nkhe->nhqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("nhqk,nkhe->nqhe", weights, v).flatten(-2)


def _linear(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    return x @ tensors[f"{name}.weight"].double().t() + tensors[f"{name}.bias"].double()


def _norm(tensors: Tensors, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * tensors[f"{name}.weight"].double() + tensors[f"{name}.bias"].double()


def _quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + (-1.702 * x).exp())


def _under(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
