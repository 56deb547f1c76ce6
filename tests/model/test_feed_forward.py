"""SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.args import ModelArgs
from accessory.model.feed_forward import FeedForward, swiglu


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_gradients_are_the_functions() -> None:
    """Finite differences in float64."""
    assert torch.autograd.gradcheck(swiglu, (random(3, 4).requires_grad_(), random(3, 4, seed=1).requires_grad_()))


def test_formula() -> None:
    """gate / (1 + exp(-gate)) * up."""
    gate, up = random(3, 4), random(3, 4, seed=1)
    torch.testing.assert_close(swiglu(gate, up), gate / (1 + (-gate).exp()) * up)


def test_bf16_is_close_to_float64() -> None:
    """Value and gradients within three roundings of bf16, and only gate and up are kept."""
    leaves = [random(50, 64, seed=seed, dtype=torch.bfloat16).requires_grad_() for seed in (0, 1)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dy = random(50, 64, seed=2, dtype=torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = swiglu(*leaves)
    y.backward(dy)
    wanted = F.silu(wide[0]) * wide[1]
    wanted.backward(dy.double())
    pairs = [(y, wanted), *((leaf.grad, wider.grad) for leaf, wider in zip(leaves, wide, strict=True))]
    for found, exact in pairs:
        torch.testing.assert_close(found.double(), exact, rtol=3 * 2**-8, atol=2**-9)
    assert [t.data_ptr() for t in saved] == [leaf.data_ptr() for leaf in leaves]


def test_layer_is_w2_of_swiglu() -> None:
    """w1 gates, w3 is gated, w2 leads back; biases where the settings say so."""
    args = ModelArgs(dim=16, n_heads=2, hidden_dim=24, mlp_bias=True)
    layer = FeedForward(args, 1, dtype=torch.float64)
    for i, (name, parameter) in enumerate(list(layer.named_parameters())):
        owner, leaf = name.rsplit(".", 1)
        setattr(layer.get_submodule(owner), leaf, nn.Parameter(random(*parameter.shape, seed=i)))
    x = random(5, 16, seed=9)
    gate, up = (F.linear(x, w.weight, w.bias) for w in (layer.w1, layer.w3))
    wanted = F.linear(F.silu(gate) * up, layer.w2.weight, layer.w2.bias)
    torch.testing.assert_close(layer(x), wanted)
