"""The linear layer: its slices, its product, its bias, and what a method adds."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from accessory.kernels.addition import Addition
from accessory.model import linear as linear_module
from accessory.model.linear import Linear, _AddBias, project_columns
from accessory.model.recomputable import Recomputation
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


@pytest.mark.parametrize(("cut", "dtype"), [("column", torch.float32), ("row", torch.float32), ("row", torch.bfloat16)])
def test_scaled_outputs(monkeypatch: pytest.MonkeyPatch, cut: str, dtype: torch.dtype) -> None:
    """s (x W^T + b) and all gradients, beside NF4; in bf16 a scale of 1.003 counts; sums are in parts."""
    monkeypatch.setattr(linear_module, "_ROWS", 2)
    linear, weight = filled(cut, bias=True, quant="nf4")
    linear.add_scale()
    assert slicing_of(linear.scale) == (Slicing(dim=0) if cut == "column" else WHOLE)
    linear.scale = nn.Parameter(1 + 0.3 * random(32, seed=3, dtype=torch.float32))
    x, dy = random(5, 64, seed=2, dtype=dtype).requires_grad_(), random(5, 32, seed=4, dtype=dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, linear.bias, linear.scale)]
    wanted = (wide[0] @ weight.double().t() + wide[1]) * wide[2]
    found = linear(x)
    assert found.dtype == dtype
    gradients = zip(
        torch.autograd.grad(found, (x, linear.bias, linear.scale), dy),
        torch.autograd.grad(wanted, wide, dy.double()),
        strict=True,
    )
    for one, other in [(found, wanted), *gradients]:
        assert (one.double() - other).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * other.norm()
    ones, near = (torch.full((64,), value) for value in (1.0, 1.003))
    y = torch.linspace(1, 2, 64, dtype=torch.bfloat16)[None]
    assert not torch.equal(linear_module._Scale.apply(y, near), linear_module._Scale.apply(y, ones))


def test_scales_of_a_recomputed_block() -> None:
    """The product before a block's last scale is needed again, though nobody reads the block's result."""
    linear, _ = filled("row", bias=False)
    linear.add_scale()
    linear.scale, linear.ends_block = nn.Parameter(random(32, dtype=torch.float32)), True
    x = random(3, 64, dtype=torch.float32)
    wanted = torch.autograd.grad(linear(x).square().sum(), linear.scale)
    again = checkpoint(linear, x, use_reentrant=False, context_fn=lambda: (nullcontext(), Recomputation()))
    assert torch.equal(*wanted, *torch.autograd.grad(again.square().sum(), linear.scale))


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
