"""Products with plain and packed matrices, and what stands beside them, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from accessory.kernels.addition import Addition
from accessory.kernels.avx512 import packed_products
from accessory.quant import storage, workspace
from accessory.quant.products import Matrix, memory_to_multiply, multiply, scaled_product, sum_of_products
from tests.kernels.operations import Operations

KINDS = ["plain", "plain in fp32", "nf4", "nf4_single", "int8", "nf4, odd shape"]
ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-6}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers, fp32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(kind: str, seed: int = 0) -> Matrix:
    """Of 34 rows."""
    shape = (34, 96) if kind == "nf4, odd shape" else (34, 128)
    values = 0.05 * random(*shape, seed=seed)
    if kind.startswith("plain"):
        return values if "fp32" in kind else values.bfloat16()
    weight = storage(kind.split(",")[0])(shape)
    weight.pack(values)
    return weight


def wide(w: Matrix, dtype: torch.dtype) -> Tensor:
    """What products in `dtype` multiply with, in float64."""
    return (w.to(dtype) if isinstance(w, Tensor) else w.unpack(dtype)).double()


def error(found: Tensor, exact: Tensor) -> float:
    """Relative to the norm."""
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("avx512", ["0", "1"])
@pytest.mark.parametrize("rank", [0, 3, 8])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64(
    switch_cpu_kernels: Callable[[bool], None], kind: str, biased: bool, rank: int, avx512: str, dtype: torch.dtype
) -> None:
    """To the rounding of the dtype, with the CPU's kernel and without; of matrices that lie alike and not."""
    switch_cpu_kernels(avx512 == "1")
    one, other = matrix(kind), matrix("plain" if rank == 3 and "odd" not in kind else kind, seed=1)
    (n, k), w, v = one.shape, wide(one, dtype), wide(other, dtype)
    x, dy, dz, bias = random(20, k).to(dtype), random(20, n).to(dtype), random(20, n, seed=2).to(dtype), random(n)
    low, a, b = random(20, rank).to(dtype), random(rank, k), random(n, rank)
    with torch.no_grad():
        y = multiply(x, one, Addition(bias if biased else None, a, b, 0.5), low if rank else None)
        dx = sum_of_products([dy, dz], [one, other], transposed=True, low=(low, 0.5 * a, 1.0) if rank else None)
        exact = x.double() @ w.t() + 0.5 * low.double() @ b.to(dtype).double().t() + biased * bias.double()
    assert y.dtype == dx.dtype == dtype
    assert error(y, exact) < ROUNDING[dtype]
    exact = dy.double() @ w + dz.double() @ v + low.double() @ (0.5 * a).to(dtype).double()
    assert error(dx, exact) < 1.5 * ROUNDING[dtype]


@pytest.mark.parametrize("avx512", ["0", "1"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_young_lora_adds_is_not_lost(
    switch_cpu_kernels: Callable[[bool], None], kind: str, biased: bool, avx512: str
) -> None:
    """A thousandth of the result each, and a young bias: added to one that is rounded, nothing of it would be left."""
    switch_cpu_kernels(avx512 == "1")
    weight = matrix(kind)
    x = random(400, weight.shape[1]).bfloat16()
    without = multiply(x, weight).double()
    size = 1e-3 * float(without.abs().mean())
    low, b = torch.ones(400, 2, dtype=torch.bfloat16), torch.full((34, 2), size)
    bias = torch.full((34,), size) if biased else None
    found = multiply(x, weight, Addition(bias, b=b, scale=0.5), low).double()
    assert float((found - without).mean()) == pytest.approx((1 + biased) * size, rel=0.25)


@pytest.mark.usefixtures("needs_cpu_kernels")
def test_nor_beside_a_large_bias_by_the_kernel() -> None:
    """It rounds once."""
    weight = matrix("nf4")
    x = random(400, 128).bfloat16()
    bias = torch.full((34,), 10 * float(multiply(x, weight).abs().mean()))
    size = 1e-4 * float(bias[0])
    low, b = torch.ones(400, 2, dtype=torch.bfloat16), torch.full((34, 2), size)
    found, without = multiply(x, weight, Addition(bias, b=b, scale=0.5), low), multiply(x, weight, Addition(bias))
    assert float((found.double() - without.double()).mean()) == pytest.approx(size, rel=0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_is_what_is_made(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Of matrices alike; where one of them lies plain, it is unpacked for their sum."""
    monkeypatch.setattr(workspace, "_pieces", {})
    packed_products._kept.__dict__.clear()
    ranks, low, b = [4, 4], random(20, 4).to(dtype), random(34, 4)
    for kinds in (("nf4", "nf4"), ("nf4", "plain")):
        matrices = [matrix(kind, seed=i) for i, kind in enumerate(kinds)]
        for one in matrices:
            multiply(random(20, 128).to(dtype), one, Addition(b=b), low)
        beside = random(20, 8).to(dtype), random(8, 128), 1.0
        sum_of_products([random(20, 34).to(dtype)] * 2, matrices, transposed=True, low=beside)
        kept = getattr(packed_products._kept, "memory", torch.empty(0)).nbytes
        buffers = sum(piece.memory.nbytes for piece in workspace._pieces.values())
        found = memory_to_multiply(matrices, ranks, 20, dtype, torch.device("cpu"), backward=True)
        assert found[1] == buffers
        assert found[0] == kept or (kinds[1] == "plain" and found[0] < kept)


def test_memory_for_what_lies_plain_is_none() -> None:
    """Nothing is unpacked."""
    found = memory_to_multiply([matrix("plain")] * 2, [0, 4], 20, torch.bfloat16, torch.device("cpu"), backward=True)
    assert found == (0, 0)


@pytest.mark.usefixtures("needs_cpu_kernels")
def test_memory_of_a_wide_matrix_is_that_of_the_forward() -> None:
    """A row of it is longer than a column."""
    weight = storage("nf4")((34, 512))
    weight.pack(random(34, 512))
    packed_products._kept.__dict__.clear()
    multiply(random(20, 512).bfloat16(), weight)
    sum_of_products([random(20, 34).bfloat16()], [weight], transposed=True)
    found, _ = memory_to_multiply([weight], [0], 20, torch.bfloat16, torch.device("cpu"), backward=True)
    assert found == packed_products._kept.memory.nbytes


@pytest.mark.usefixtures("needs_cpu_kernels")
def test_memory_of_a_product_that_has_no_backward() -> None:
    """Of a narrow matrix the transposed product takes more than the product."""
    weight = storage("nf4")((512, 64))
    weight.pack(random(512, 64))
    packed_products._kept.__dict__.clear()
    multiply(random(20, 64).bfloat16(), weight)
    alone, both = (
        memory_to_multiply([weight], [0], 20, torch.bfloat16, torch.device("cpu"), backward=backward)[0]
        for backward in (False, True)
    )
    assert alone == packed_products._kept.memory.nbytes < both


def test_on_cuda_a_scale_takes_no_pass() -> None:
    """Neither over LoRA's part of the result nor over gradients: the product itself is scaled, and nothing added."""
    sizes = (9, 8), (6, 8), (9, 2), (6, 2)
    with FakeTensorMode(), torch.no_grad():
        x, w, low, b = (torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in sizes)
        with Operations() as seen:
            sum_of_products([x], [w], transposed=False, low=(low, b, 2.0))
    assert [name for name in seen.names if name != "new_empty"] == ["addmm", "addmm_"]
    made, ignored = (random(9, 2), random(2, 6)), torch.full((), torch.nan)
    torch.testing.assert_close(torch.addmm(ignored, *made, beta=0, alpha=0.3), scaled_product(*made, 0.3))
