"""Downsamples of a base state: values and gradients by their formulas in float64, and what is kept of the state."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.method.downsample import BLOCK, DOWNSAMPLES, Downsample, kept_in, make_downsample
from accessory.method.side_settings import SideSettings

WIDE, NARROW, TOKENS = 130, 32, 9


def made(kind: str, **settings: object) -> Downsample:
    """At random, in fp32."""
    found = make_downsample(WIDE, NARROW, SideSettings(downsample=kind, peft_hidden_size=6, **settings)).to_empty(
        device="cpu"
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in found.parameters():
        parameter.data.normal_(generator=generator, std=0.2, mean=parameter.dim() == 1)
    return found.eval()


def state(dtype: torch.dtype = torch.float32) -> Tensor:
    """Of a few tokens, two channels larger than the others."""
    found = torch.randn(TOKENS, WIDE, generator=torch.Generator().manual_seed(1))
    found[:, [3, 100]] *= 50
    return found.to(dtype)


def formula(module: Downsample, x: Tensor, kind: str, before: bool, after: bool) -> Tensor:
    """What it computes, in float64 and with its own parameters."""
    w = {name: parameter.double() for name, parameter in module.named_parameters()}
    if kind == "linear":
        return x @ w["weight.weight"].t()
    if kind == "lora":
        return x @ w["a.weight"].t() @ w["b.weight"].t()
    if kind in ("avgpool", "maxpool"):
        r = WIDE // NARROW
        each = torch.stack([x[:, r * i : r * (i + 1)] for i in range(NARROW)], 1)
        return each.mean(2) if kind == "avgpool" else each.max(2).values
    if before:
        x = F.layer_norm(x, (WIDE,), w["norm_before.weight"], w["norm_before.bias"], 1e-5)
    x = F.silu(x @ w["a.weight"].t()) @ w["b.weight"].t()
    return F.layer_norm(x, (NARROW,), w["norm_after.weight"], w["norm_after.bias"], 1e-5) if after else x


@pytest.mark.parametrize(("before", "after"), [(False, False), (True, True)])
@pytest.mark.parametrize("kind", DOWNSAMPLES)
def test_equals_float64(kind: str, before: bool, after: bool) -> None:
    """Values, and gradients of all parameters."""
    module = made(kind, adapter_activation="silu", add_layer_norm_before_adapter=before,
                  add_layer_norm_after_adapter=after)  # fmt: skip
    factors = torch.randn(TOKENS, NARROW, generator=torch.Generator().manual_seed(2)).double()
    found, wanted = module(state()), formula(module, state().double(), kind, before, after)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    parameters = list(module.parameters())
    assert bool(parameters) == (not kind.endswith("pool")) and found.shape == (TOKENS, NARROW)
    if parameters:
        pairs = (torch.autograd.grad((result.double() * factors).sum(), parameters) for result in (found, wanted))
        for one, other in zip(*pairs, strict=True):
            assert (one - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_kept_in_8_bits(dtype: torch.dtype) -> None:
    """Off by no more than a 254th of its block's largest value; the forward reads the state itself; zeros stay."""
    x = torch.cat([state(dtype)[:, : 2 * BLOCK], torch.zeros(TOKENS, BLOCK, dtype=dtype)], 1)
    kept = kept_in(8, x)
    again = kept.make(*kept.inputs)
    assert kept.value is x and again.dtype == dtype
    assert sum(part.nbytes for part in kept.inputs) == x.numel() + x.numel() // BLOCK * 4
    largest = x.double().unflatten(1, (-1, BLOCK)).abs().amax(2).repeat_interleave(BLOCK, 1)
    rounding = torch.finfo(dtype).eps
    assert ((again.double() - x.double()).abs() <= largest * (1 / 254 + rounding)).all()
    assert (again.double() - x.double()).abs().max() > 0 and not again[:, 2 * BLOCK :].any()


def test_a_state_kept_as_it_is() -> None:
    """With 16 bits; and in an evaluation, which keeps nothing."""
    x = state()
    assert kept_in(16, x).inputs[0] is x
    with torch.no_grad():
        assert kept_in(8, x).inputs[0] is x


def test_dropout_of_an_adapter() -> None:
    """In training only: its share of numbers is zero, the mean is kept, and the backward sees the same ones."""
    module = made("adapter", dropout=0.4, add_layer_norm_before_adapter=False, add_layer_norm_after_adapter=False,
                  adapter_activation="relu", state_bits=16)  # fmt: skip
    with torch.no_grad():
        module.a.weight.copy_(torch.eye(6, WIDE))
        module.b.weight.copy_(torch.eye(NARROW, 6))
    ones = torch.ones(5000, WIDE)
    assert torch.equal(module(ones)[:, :6], ones[:, :6])
    found = module.train()(ones)
    assert found[:, :6].unique().tolist() == [0, pytest.approx(1 / 0.6)]
    assert found[:, :6].mean().item() == pytest.approx(1, abs=0.05)
    (gradient,) = torch.autograd.grad(found[:, 0].sum(), module.a.weight)
    assert gradient[0, 0].item() == pytest.approx(found[:, 0].sum().item(), rel=1e-5)
