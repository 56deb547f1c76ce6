"""The feed-forward layer and its activations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.args import ModelArgs
from accessory.model.feed_forward import FeedForward, activate, gate


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


FORMULAS = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x * (x > 0),
}


@pytest.mark.parametrize("activation", FORMULAS)
def test_gate_is_its_formula(activation: str) -> None:
    """act(x) * up and its gradients in float64: against the formula, and by finite differences."""
    leaves = [random(30, 4).requires_grad_(), random(30, 4, seed=1).requires_grad_()]
    wide = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    dy = random(30, 4, seed=2)
    made, wanted = gate(*leaves, activation), FORMULAS[activation](wide[0]) * wide[1]
    found = made.value
    assert torch.equal(made.make(*made.inputs), found)
    found.backward(dy)
    wanted.backward(dy)
    for one, other in ((found, wanted), *((leaf.grad, w.grad) for leaf, w in zip(leaves, wide, strict=True))):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(lambda x, up: gate(x, up, activation).value, leaves)


@pytest.mark.parametrize("activation", FORMULAS)
def test_activation_is_its_formula(activation: str) -> None:
    """The same without a gate."""
    x, dy = random(30, 4).requires_grad_(), random(30, 4, seed=2)
    wide = x.detach().clone().requires_grad_()
    made, wanted = activate(x * 1, activation), FORMULAS[activation](wide)
    found = made.value
    assert torch.equal(made.make(*made.inputs), found)
    found.backward(dy)
    wanted.backward(dy)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(x.grad, wide.grad)


def test_nothing_that_can_be_made_again_holds_a_graph() -> None:
    """What a reader keeps is detached: it must not keep whole layers alive."""
    leaves = [random(5, 4).requires_grad_() * 1 for _ in range(2)]
    for made in (gate(*leaves), activate(leaves[0], "silu")):
        assert not any(t.requires_grad for t in made.inputs)


def test_relu_keeps_its_result_alone() -> None:
    """Which the next linear may keep too, at no further cost."""
    fresh = random(5, 4).requires_grad_() * 1
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = activate(fresh, "relu").value
    assert [t.data_ptr() for t in saved] == [y.data_ptr()] == [fresh.data_ptr()]


def test_bf16_is_close_to_float64() -> None:
    """Value and gradients within three roundings of bf16, and only gate and up are kept."""
    leaves = [random(50, 64, seed=seed, dtype=torch.bfloat16).requires_grad_() for seed in (0, 1)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dy = random(50, 64, seed=2, dtype=torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = gate(*leaves).value
    y.backward(dy)
    wanted = F.silu(wide[0]) * wide[1]
    wanted.backward(dy.double())
    pairs = [(y, wanted), *((leaf.grad, wider.grad) for leaf, wider in zip(leaves, wide, strict=True))]
    for found, exact in pairs:
        torch.testing.assert_close(found.double(), exact, rtol=3 * 2**-8, atol=2**-9)
    assert [t.data_ptr() for t in saved] == [leaf.data_ptr() for leaf in leaves]


def filled(**settings) -> FeedForward:
    """A float64 layer of width 24 with random weights and biases."""
    args = ModelArgs(dim=16, n_heads=2, hidden_dim=24, mlp_bias=True, **settings)
    layer = FeedForward(args, 1, dtype=torch.float64)
    for i, (name, parameter) in enumerate(list(layer.named_parameters())):
        owner, leaf = name.rsplit(".", 1)
        setattr(layer.get_submodule(owner), leaf, nn.Parameter(random(*parameter.shape, seed=i)))
    return layer


@pytest.mark.parametrize("activation", FORMULAS)
def test_layer_with_a_gate(activation: str) -> None:
    """w1 gates, w3 is gated, w2 leads back; biases where the settings say so."""
    layer, x = filled(activation=activation), random(5, 16, seed=9)
    first, up = (F.linear(x, w.weight, w.bias) for w in (layer.w1, layer.w3))
    wanted = F.linear(FORMULAS[activation](first) * up, layer.w2.weight, layer.w2.bias)
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("activation", FORMULAS)
def test_layer_without_a_gate(activation: str) -> None:
    """w2(act(w1 x)), and no w3."""
    layer, x = filled(gated=False, activation=activation), random(5, 16, seed=9)
    inner = FORMULAS[activation](F.linear(x, layer.w1.weight, layer.w1.bias))
    torch.testing.assert_close(layer(x), F.linear(inner, layer.w2.weight, layer.w2.bias))
    assert not hasattr(layer, "w3")
