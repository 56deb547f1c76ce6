"""llm_int8 against bitsandbytes' matmul with a threshold of 6, and against a float64 formula."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from torch import Tensor

from accessory.kernels.addition import Addition
from accessory.model.projection import project
from accessory.quant import storage
from accessory.quant.int8 import Int8Weight
from accessory.quant.llm_int8 import THRESHOLD, LlmInt8, outlier_columns
from accessory.quant.products import memory_to_multiply, multiply
from tests.memory.allocated_peak import AllocatedPeak

ROWS, COLUMNS, TOKENS = 48, 192, 40
OUTLIERS = [3, 64, 65, 190]
UNIT = {torch.float64: 1e-13, torch.float32: 2e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Twice the rounding of a dtype; bitsandbytes' constant for 1 / 127^2 is off by 1.8e-5 on a CPU."""


def random(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers, fp32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(kind: type[Int8Weight] = LlmInt8, columns: slice = slice(None)) -> Int8Weight:
    """A matrix [48, 192], or some columns of it."""
    weight = (random(ROWS, COLUMNS) * torch.logspace(-2, 0, ROWS)[:, None])[:, columns]
    result = kind(tuple(weight.shape))
    result.pack(weight)
    return result


def inputs(dtype: torch.dtype, outliers: list[int] = OUTLIERS) -> Tensor:
    """x [40, 192], some of its columns with a few values beyond the threshold, and others just below it."""
    x = random(TOKENS, COLUMNS, seed=1)
    x[:, 17] = 5.5
    for i, column in enumerate(outliers):
        x[i::7, column] = (-1) ** i * (THRESHOLD + 10 * i)
    return x.to(dtype)


def formula(x: Tensor, w: Int8Weight) -> Tensor:
    """x W^T in float64, value by value as the paper has it."""
    x, weight = x.double(), w.codes.double() * w.scales.double()[:, None] / 127
    outlier = x.abs() >= 6
    columns = outlier.any(0)
    scales = x.where(~outlier, 0).abs().amax(1, keepdim=True)
    codes = (x * 127 / scales).round().where(~columns, 0)
    return codes * scales / 127 @ weight.t() + x.where(columns, 0) @ weight.t()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("outliers", [OUTLIERS, []], ids=["outliers", "none"])
def test_forward_and_backward_are_bitsandbytes(dtype: torch.dtype, outliers: list[int]) -> None:
    """Its autograd function, which a matmul in evaluation runs on every device; codes and scales are the same."""
    w, dy = packed(), random(TOKENS, ROWS, seed=2).to(dtype)
    x = inputs(torch.float16, outliers).to(dtype)  # bitsandbytes rounds to fp16 before it makes codes
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB, state.has_fp16_weights, state.is_training = w.codes, w.scales, False, False
    wanted = bitsandbytes.matmul(theirs, w.codes, state=state, threshold=6.0)
    assert state.idx.tolist() == outliers == outlier_columns(ours).tolist()
    (found,) = project(ours, [w])
    found.backward(dy)
    wanted.backward(dy)
    for one, other in ((found, wanted), (ours.grad, theirs.grad)):
        assert one.dtype == other.dtype == dtype
        assert (one - other).norm() <= UNIT[dtype] * other.norm()


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("added", ["nothing", "bias", "LoRA"])
def test_equals_the_formula(dtype: torch.dtype, added: str) -> None:
    """To the rounding of the dtype, in pieces of few rows; the gradient is that of the unpacked matrix."""
    w, x, dy = packed(), inputs(dtype).requires_grad_(), random(TOKENS, ROWS, seed=2).to(dtype)
    w._rows_at_a_time = lambda rows, device: 7
    bias, a, b = random(ROWS), random(4, COLUMNS, seed=3) / 10, random(ROWS, 4, seed=4) / 10
    addition = {"nothing": Addition(), "bias": Addition(bias), "LoRA": Addition(bias, a, b, 0.5)}[added]
    y = project(x, [w], [addition])[0]
    y.backward(dy)
    a, b = a.to(dtype).double(), b.to(dtype).double()
    wanted, of_x = (
        formula(x.detach(), w),
        dy.double() @ w.unpack(dtype).double(),
    )
    wanted += bias.to(dtype).double() * (added != "nothing")
    if added == "LoRA":
        wanted += 0.5 * x.detach().double() @ a.t() @ b.t()
        of_x += 0.5 * dy.double() @ b @ a
    assert (y - wanted).norm() <= UNIT[dtype] * wanted.norm()
    assert (x.grad - of_x).norm() <= UNIT[dtype] * of_x.norm()


def test_outliers_keep_the_rest_exact() -> None:
    """With them in the rows' scales, everything beside them would be rounded to little."""
    x, w = inputs(torch.float32), packed()
    x[:, OUTLIERS[3]] = 600
    exact = x.double() @ w.unpack(torch.float64).t()
    scales = x.double().abs().amax(1, keepdim=True)
    spoiled = (x.double() * 127 / scales).round() * scales / 127 @ w.unpack(torch.float64).t()
    without = exact - x.double()[:, OUTLIERS] @ w.unpack(torch.float64)[:, OUTLIERS].t()
    errors = [(y - exact).norm() / without.norm() for y in (multiply(x, w).double(), spoiled)]
    assert errors[0] < 0.02 < 0.5 < errors[1]


def test_rows_that_are_special() -> None:
    """Zeros give zeros, what is not finite is not hidden, no row gives no row."""
    x, w = inputs(torch.bfloat16), packed()
    x[0], x[1, 5], x[2, 3] = 0, float("nan"), float("inf")
    y = multiply(x, w)
    assert not y[0].any() and y[1].isnan().all() and not y[2].isfinite().any() and y[3:].isfinite().all()
    assert multiply(x[:0], w).shape == (0, ROWS)


def test_slices_of_columns_sum_to_the_whole() -> None:
    """As row-parallel ranks do: to the roundings of rows' scales, which are each slice's own; outliers are the same."""
    x = inputs(torch.float32)
    halves = [slice(0, 96), slice(96, None)]
    parts = sum(multiply(x[:, half], packed(columns=half)).double() for half in halves)
    whole = multiply(x, packed()).double()
    assert (parts - whole).norm() < 0.02 * whole.norm()
    found = [96 * i + int(c) for i, half in enumerate(halves) for c in outlier_columns(x[:, half])]
    assert found == OUTLIERS


@pytest.mark.parametrize("shape", [(512, 64), (64, 512)])
def test_memory_is_what_is_made(shape: tuple[int, int]) -> None:
    """Without outliers, whose number depends on the data."""
    w, x = LlmInt8(shape), random(300, shape[1]).clamp(-5, 5).bfloat16()
    w.pack(random(*shape))
    with torch.no_grad(), AllocatedPeak() as peak:
        multiply(x, w)
    workspace, buffer = memory_to_multiply([w], [0], 300, x.dtype, x.device, backward=False)
    assert buffer == 0 and workspace == pytest.approx(peak.bytes - 300 * shape[0] * 2, rel=0.05)


def test_reads_what_is_packed_as_int8() -> None:
    """And the other way round; nothing else."""
    assert storage("llm_int8").used_for(storage("int8")) is LlmInt8
    assert storage("int8").used_for(storage("llm_int8")) is Int8Weight
    assert storage("llm_int8").used_for(storage("nf4")) is storage("nf4").used_for(storage("int8")) is None
