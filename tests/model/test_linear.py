"""The linear layer: its slices, its product, its bias, and what a method adds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.kernels.addition import Addition
from accessory.model.linear import Linear, _AddBias, project_columns
from accessory.parallel.tensor import WHOLE, Slicing, slicing_of
from accessory.quant import storage


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def filled(cut: str, *, bias: bool, quant: str | None = None) -> tuple[Linear, Tensor]:
    """A layer 64 -> 32 with random weights, and the matrix it multiplies with."""
    maker = storage(quant) if quant else None
    linear = Linear(64, 32, cut=cut, ranks=1, bias=bias, dtype=torch.float32, storage=maker)
    weight = random(32, 64, dtype=torch.float32)
    if quant:
        linear.weight.pack(weight)
        weight = linear.weight.unpack(torch.float32)
    else:
        linear.weight = nn.Parameter(weight)
    if bias:
        linear.bias = nn.Parameter(random(32, seed=1, dtype=torch.float32))
    return linear, weight


@pytest.mark.parametrize(
    ("cut", "weight", "bias", "weight_slicing", "bias_slicing"),
    [
        ("column", (8, 64), (8,), Slicing(dim=0), Slicing(dim=0)),
        ("row", (32, 16), (32,), Slicing(dim=1), WHOLE),
    ],
)
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_slices_of_four_ranks(cut, weight, bias, weight_slicing, bias_slicing, quant) -> None:
    """A column layer holds rows of W and of b, a row layer columns of W and the whole b."""
    maker = storage(quant) if quant else None
    linear = Linear(64, 32, cut=cut, ranks=4, bias=True, dtype=torch.bfloat16, storage=maker)
    assert tuple(linear.weight.shape) == weight
    assert tuple(linear.bias.shape) == bias
    assert (linear.weight.slicing if quant else slicing_of(linear.weight)) == weight_slicing
    assert slicing_of(linear.bias) == bias_slicing
    assert all(parameter.is_meta for parameter in linear.parameters())


@pytest.mark.parametrize("quant", [None, "nf4", "nf4_single", "fp4"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cut", ["column", "row"])
def test_forward_is_a_linear(cut: str, bias: bool, quant: str | None) -> None:
    """x W^T + b, whatever W is stored in."""
    linear, weight = filled(cut, bias=bias, quant=quant)
    x = random(5, 64, seed=2, dtype=torch.float32)
    wanted = F.linear(x.double(), weight.double(), linear.bias.double() if bias else None)
    torch.testing.assert_close(linear(x).double(), wanted, rtol=1e-5, atol=2e-5)


def test_linears_that_share_an_input() -> None:
    """Together they give what each gives alone."""
    linears = [filled("column", bias=bias, quant=quant)[0] for bias, quant in ((True, None), (False, "nf4"))]
    x = random(5, 64, seed=2, dtype=torch.float32)
    for found, linear in zip(project_columns(x, linears), linears, strict=True):
        assert torch.equal(found, linear(x))


def test_bias_gradient() -> None:
    """Finite differences in float64; the sum is made in place, so the check hands over a copy."""
    y, bias = random(3, 4).requires_grad_(), random(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda y, b: _AddBias.apply(y.clone(), b), (y, bias))


def test_bias_gradient_is_summed_in_fp32() -> None:
    """4,097 ones: a bf16 sum would stop at 256 or round to 4,096."""
    y = torch.zeros(4097, 2, dtype=torch.bfloat16)
    bias = torch.zeros(2, requires_grad=True)
    _AddBias.apply(y, bias).backward(torch.ones(4097, 2, dtype=torch.bfloat16))
    assert bias.grad.tolist() == [4097.0, 4097.0]


def test_a_frozen_bias_gets_no_gradient() -> None:
    """A checkpoint's own bias that is not trained."""
    linear, _ = filled("column", bias=True)
    linear.bias.requires_grad_(False)
    linear(random(2, 64, dtype=torch.float32).requires_grad_()).sum().backward()
    assert linear.bias.grad is None


def with_lora(dropout: float, scale: float = 1.0) -> Linear:
    """A column layer 64 -> 32 with factors of rank 4, on the meta device."""
    linear = Linear(64, 32, cut="column", ranks=1, bias=False, dtype=torch.float32)
    linear.add_lora(4, scale, dropout)
    return linear


def test_dropout_only_in_training() -> None:
    """While training a quarter of LoRA's inputs is zero and the rest grown to keep the mean; asked, nothing is lost."""
    torch.manual_seed(0)
    linear = with_lora(0.25, scale=3.0)
    addition = linear.addition(None)
    kept = addition.dropout_mask(torch.empty(1000, 6))
    assert addition.scale == pytest.approx(4.0)
    assert kept.unique().tolist() == [0.0, 1.0]
    assert (kept == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    assert linear.eval().addition(None)[3:] == Addition(scale=3.0)[3:]


def test_what_drops_out_is_the_same_at_every_call() -> None:
    """Of one forward; of another one it is another."""
    torch.manual_seed(0)
    linear, x = with_lora(0.5), torch.empty(100, 6)
    one, other = linear.addition(None), linear.addition(None)
    assert torch.equal(one.dropout_mask(x), one.dropout_mask(x))
    assert not torch.equal(one.dropout_mask(x), other.dropout_mask(x))


def test_dropout_of_two_ranks(torchrun) -> None:
    """Columns drop the same values of the same input, rows each their own (checks in dropout_worker.py)."""
    done = torchrun(2, Path(__file__).with_name("dropout_worker.py"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("OK") == 2
