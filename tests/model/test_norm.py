"""The norms against torch's own, in value, gradient and memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.model.args import ModelArgs
from accessory.model.norm import LayerNorm, Norm, RMSNorm, _LayerNorm, _RMSNorm, make_norm

EPS = 1e-3  # large enough to show in the values


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def filled(weight: Tensor) -> RMSNorm:
    """A norm with this weight."""
    norm = RMSNorm(len(weight), EPS)
    norm.weight = torch.nn.Parameter(weight.clone())
    return norm


def test_gradients_are_the_functions() -> None:
    """Finite differences in float64, for input and weight."""
    x, weight = random(3, 6).requires_grad_(), random(6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, EPS, x.detach(), None), (x, weight))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_equals_torch(dtype: torch.dtype, tolerance: float) -> None:
    """Value and gradients against float64, to the rounding of the dtype; the weight and its gradient are fp32."""
    x, dy = random(5, 64, dtype=dtype), random(5, 64, seed=2, dtype=dtype)
    weight = 1 + random(64, seed=1, dtype=torch.float32)
    norm, leaf = filled(weight), x.clone().requires_grad_()
    y = norm(leaf)
    y.backward(dy)
    wide, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    wanted = F.rms_norm(wide, (64,), wide_weight, EPS)
    wanted.backward(dy.double())
    assert (y.dtype, leaf.grad.dtype, norm.weight.grad.dtype) == (dtype, dtype, torch.float32)
    torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(norm.weight.grad.double(), wide_weight.grad, rtol=1e-5, atol=1e-5)


def test_weight_starts_on_meta_in_fp32() -> None:
    """Whatever the model's dtype."""
    weight = RMSNorm(8, EPS).weight
    assert weight.is_meta
    assert weight.dtype == torch.float32


def test_keeps_its_input_and_one_number_a_token() -> None:
    """No fp32 copy of a bf16 input waits for the backward."""
    norm, x = filled(torch.ones(64)), random(5, 64, dtype=torch.bfloat16).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm(x)
    others = [t for t in saved if t.data_ptr() not in (x.data_ptr(), norm.weight.data_ptr())]
    assert [(tuple(t.shape), t.dtype) for t in others] == [((5, 1), torch.float32)]


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_made_again_bit_for_bit(kind: type[Norm], dtype: torch.dtype) -> None:
    """Of what the norm keeps anyway, by a linear that would keep the result."""
    norm, x = kind(64, EPS), random(5, 64, dtype=dtype).requires_grad_()
    for i, name in enumerate([name for name, _ in norm.named_parameters()]):
        setattr(norm, name, torch.nn.Parameter(random(64, seed=i, dtype=torch.float32)))
    made = norm.recomputable(x)
    assert torch.equal(made.make(*made.inputs), made.value)
    assert torch.equal(norm(x), made.value)
    assert made.inputs[0].data_ptr() == x.data_ptr()
    assert not made.inputs[0].requires_grad


def test_only_wanted_gradients() -> None:
    """A frozen weight gets none; an input that needs none gets none."""
    norm, x = filled(torch.ones(8)), random(2, 8, dtype=torch.float32).requires_grad_()
    norm.weight.requires_grad_(False)
    norm(x).sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is None
    norm.weight.requires_grad_()
    norm(x.detach()).sum().backward()
    assert norm.weight.grad is not None


def test_many_heads_share_a_weight() -> None:
    """Over [T, H, E], as queries have it, the weight's gradient is summed over tokens and heads."""
    x, dy, norm = random(5, 3, 8), random(5, 3, 8, seed=1), filled(1 + random(8, seed=2, dtype=torch.float32))
    norm(x).backward(dy)
    weight = norm.weight.detach().double().requires_grad_()
    F.rms_norm(x, (8,), weight, EPS).backward(dy)
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-5)


def layer_norm(dim: int) -> LayerNorm:
    """A LayerNorm with random fp32 weight and bias."""
    norm = LayerNorm(dim, EPS)
    norm.weight = torch.nn.Parameter(1 + random(dim, seed=1, dtype=torch.float32))
    norm.bias = torch.nn.Parameter(random(dim, seed=3, dtype=torch.float32))
    return norm


def test_layer_norm_gradients_are_the_functions() -> None:
    """Finite differences in float64, for input, weight and bias."""
    leaves = [random(3, 6), random(6, seed=1), random(6, seed=2)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda x, w, b: _LayerNorm.apply(x, w, b, EPS), leaves)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_layer_norm_equals_torch(dtype: torch.dtype, tolerance: float) -> None:
    """Value and gradients against float64, to the rounding of the dtype, beside fp32 weights."""
    x, dy = 3 + random(5, 64, dtype=dtype), random(5, 64, seed=2, dtype=dtype)
    norm, leaf = layer_norm(64), x.clone().requires_grad_()
    y = norm(leaf)
    y.backward(dy)
    wide, weight, bias = (t.detach().double().requires_grad_() for t in (x, norm.weight, norm.bias))
    wanted = F.layer_norm(wide, (64,), weight, bias, EPS)
    wanted.backward(dy.double())
    assert (y.dtype, leaf.grad.dtype) == (dtype, dtype)
    assert (norm.weight.grad.dtype, norm.bias.grad.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=2 * tolerance)
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=tolerance, atol=2 * tolerance)
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.bias.grad.double(), bias.grad, rtol=1e-5, atol=1e-5)


def test_layer_norm_keeps_its_input_and_two_numbers_a_token() -> None:
    """No fp32 copy of a bf16 input waits for the backward."""
    norm, x = layer_norm(64), random(5, 64, dtype=torch.bfloat16).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm(x)
    known = (x.data_ptr(), norm.weight.data_ptr(), norm.bias.data_ptr())
    others = [(tuple(t.shape), t.dtype) for t in saved if t.data_ptr() not in known]
    assert others == [((5, 1), torch.float32)] * 2


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_layer_norm_makes_only_wanted_gradients(wanted: str) -> None:
    """Each of the three alone."""
    norm, x = layer_norm(8), random(2, 8, dtype=torch.float32)
    leaves = {"x": x, "weight": norm.weight, "bias": norm.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    norm(x).square().sum().backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]


def test_settings_choose_the_norm() -> None:
    """Kind, width and epsilon."""
    rms, layer = (make_norm(ModelArgs(norm=kind, norm_eps=0.25), 8) for kind in ("rms", "layer"))
    assert (type(rms), type(layer)) == (RMSNorm, LayerNorm)
    assert (layer.eps, tuple(layer.bias.shape), layer.bias.dtype) == (0.25, (8,), torch.float32)
