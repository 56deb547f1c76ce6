"""Products of a few rows with plain or 4-bit matrices, with all that comes before and after them, step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.kernels.decoding import Products
from accessory.kernels.plain.four_bit import dequantize
from accessory.kernels.plain.gate import ACTIVATIONS


def multiply(
    products: Products, x: Tensor, lows: Tensor | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `accessory.kernels.triton.decoding_products.multiply`; low products of what follows in a single part."""
    products.check(x.dtype)
    normed, inverse = x.float(), 1.0
    if products.layer_norm:
        deviation, mean = torch.var_mean(normed, 1, correction=0, keepdim=True)
        deviation = (deviation + products.eps).rsqrt()
        normed = (normed - mean) * deviation * products.norm[0] + products.norm[1]
    elif products.norm is not None:
        inverse = (normed.square().mean(1, keepdim=True) + products.eps).rsqrt()
        normed = normed * products.norm
    weights = [
        w.float() if products.plain else dequantize(w, torch.empty(w.shape, dtype=torch.float32, device=x.device))
        for w in products.matrices
    ]
    made = [normed @ weight.t() for weight in weights]
    if products.b is not None:
        rank = products.b.shape[1]
        low = lows.sum(1)[:, products.low_at : products.low_at + rank * len(weights)]
        if products.layer_norm:
            low = (low - mean * products.corrections[0]) * deviation + products.corrections[1]
        low = low.split(rank, 1)
        factors = products.b.float().split(products.widths)
        made = [y + part @ factor.t() for y, part, factor in zip(made, low, factors, strict=True)]
    made = [y * inverse for y in made]
    if products.bias is not None:
        made = [y + bias for y, bias in zip(made, products.bias.split(products.widths), strict=True)]
    if products.activation:
        made[0] = ACTIVATIONS[products.activation](made[0])
        made = [made[0] * made[1]] if len(made) == 2 else made
    y = torch.cat(made, 1)
    y = (y if residual is None else y + residual.float()).to(x.dtype)
    return y, None if products.following is None else (y.float() @ products.following.float().t())[:, None]
