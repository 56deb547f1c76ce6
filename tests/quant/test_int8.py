"""int8 rows against bitsandbytes and a float64 formula."""

from __future__ import annotations

import bitsandbytes.functional as reference
import pytest
import torch
from torch import Tensor

from accessory.model.projection import project
from accessory.quant.int8 import CPU_PIECE, Int8Weight


def matrix(rows: int = 48, columns: int = 192, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random weights, every row of another size."""
    generator = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows)[:, None]).to(dtype)


def packed(weight: Tensor) -> Int8Weight:
    """`weight` in int8."""
    result = Int8Weight(tuple(weight.shape))
    result.pack(weight)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_are_bitsandbytes(dtype: torch.dtype) -> None:
    """Bit for bit, in several pieces, from every float dtype; read back to two roundings of fp32."""
    weight = matrix(3 * CPU_PIECE // 1024, 1024, dtype)
    ours = packed(weight)
    codes, scales, _ = reference.int8_vectorwise_quant(weight)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.scales, scales)
    wanted = reference.int8_vectorwise_dequant(codes, scales)
    torch.testing.assert_close(ours.unpack(torch.float32), wanted, rtol=4 * 2**-24, atol=0)


def test_formula_and_bound() -> None:
    """W = codes * scales / 127 in float64, no weight off by more than half a step, and a row's largest by nothing."""
    weight = matrix()
    ours = packed(weight)
    exact = ours.codes.double() * ours.scales.double()[:, None] / 127
    torch.testing.assert_close(ours.unpack(torch.float64), exact, rtol=2 * 2**-24, atol=0)
    half_step = ours.scales.double()[:, None] / 254
    error = (exact - weight).abs()
    assert (error <= half_step * (1 + 1e-5)).all()
    assert (error > half_step * 0.9).any()  # the bound is reached
    largest = weight.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(exact.gather(1, largest), weight.double().gather(1, largest), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_is_fp32_rounded(dtype: torch.dtype) -> None:
    """Once, at the end."""
    ours = packed(matrix())
    assert torch.equal(ours.unpack(dtype), ours.unpack(torch.float32).to(dtype))
    assert torch.equal(ours.unpack_to_buffer(dtype), ours.unpack(dtype))


def test_rows_of_zeros_stay_zero() -> None:
    """Where bitsandbytes divides by zero."""
    weight = matrix(4, 64)
    weight[1] = 0
    ours = packed(weight)
    assert not ours.unpack(torch.float32)[1].any()
    assert ours.unpack(torch.float32)[2].any()


def test_bytes() -> None:
    """One a weight, four a row."""
    assert Int8Weight((4096, 11008)).nbytes == 4096 * 11008 + 4 * 4096
    assert packed(matrix(8, 64)).nbytes == 8 * 64 + 4 * 8


def test_slices_of_rows_are_packed_slices() -> None:
    """Cut by rows before or after packing, the bits are the same; by columns, no weight gets worse."""
    weight = matrix()
    whole, rows, columns = packed(weight), packed(weight[16:32]), packed(weight[:, 64:128])
    assert torch.equal(rows.codes, whole.codes[16:32])
    assert torch.equal(rows.scales, whole.scales[16:32])
    assert (columns.scales <= whole.scales).all()
    bound = whole.scales[:, None] / 254 * (1 + 1e-5)
    assert ((columns.unpack(torch.float32) - weight[:, 64:128]).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_product_and_its_gradient(dtype: torch.dtype) -> None:
    """Through the linear's own autograd function, against float64: exact there, in bf16 to its rounding."""
    ours = packed(matrix(24, 64))
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    dy = torch.randn(9, 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = project(x, [ours])[0]
    y.backward(dy)
    w = ours.unpack(torch.float64)
    tolerance = 1e-12 if dtype == torch.float64 else 0.01
    for found, wanted in ((y, x.double() @ w.t()), (x.grad, dy.double() @ w)):
        assert found.dtype == dtype
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()
    with torch.no_grad():
        torch.testing.assert_close(project(x, [ours])[0], y, rtol=0, atol=0)
