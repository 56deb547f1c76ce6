"""Packed matrices on the card: packing, unpacking and products of every format, bitsandbytes and optimizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from accessory.kernels.addition import Addition
from accessory.optim import OPTIMIZERS, build_optimizer
from accessory.quant import STORAGES, PackedWeight
from accessory.quant.four_bit import FourBitWeight
from accessory.quant.groups import GroupWeight
from accessory.quant.llm_int8 import LlmInt8
from accessory.quant.moments import levels, pack_moment, unpack_moment
from accessory.quant.products import gradient_product, multiply, sum_of_products
from tools.gpu_checks.check import Findings, Ground, check
from tools.gpu_checks.rates import copy_rate, seconds_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, torch.float32: 1e-5}
"""Tolerance of products: a rounding of the result, and one of what is added to it."""
OTHER_CODES = 1e-4
"""Share of codes that may differ between packing here and on a CPU: of weights that lie between two codes, and of
scales beside a mean that was summed in another order."""


@check(6)
def packing(ground: Ground, found: Findings) -> None:
    """A matrix that is packed on the card: its codes are those of the CPU, and it is as near to the weights."""
    shape = ground.pick((512, 1408), (70, 128))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    for name, kind in STORAGES.items():
        with found.case(name):
            # Groups take the best of several grids, of which two may be equally good.
            here, there, searches = kind(shape), kind(shape), issubclass(kind, GroupWeight)
            here.pack(weight)
            there.pack(weight.to(ground.device))
            for part, value in here.named_parameters():
                other = getattr(there, part).detach().cpu()
                if value.is_floating_point():
                    error = float((other.double() - value.double()).norm() / value.double().norm())
                    found.expect(error < 1e-4 or searches, f"{name}: its {part} are off by {error:.1e}")
                    continue
                differ = float((other != value).double().mean())
                found.expect(differ <= OTHER_CODES or searches, f"{name}: {differ:.1e} of its {part} are other ones")
                if differ:
                    found.figures[f"{name} {part}"] = f"{differ:.1e} differ"
            errors = [
                float((matrix.unpack(torch.float32).cpu().double() - weight.double()).norm())
                for matrix in (here, there)
            ]
            found.expect(errors[1] <= 1.001 * errors[0], f"{name}: farther from the weights than on a CPU")


@check(2)
def unpacking(ground: Ground, found: Findings) -> None:
    """The same codes unpack to the same bits, in every dtype and in odd shapes."""
    for shape in ground.pick([(512, 1408), (35, 320), (3, 128)], [(35, 320)]):
        for name, kind in STORAGES.items():
            here, there = _both(kind, shape, ground)
            for dtype in DTYPES:
                with found.case(what := f"{name} {dtype} {shape}"):
                    found.close(what, there.unpack(dtype), here.unpack(torch.float32).to(dtype), 0)


@check(5)
def products(ground: Ground, found: Findings) -> None:
    """x W^T with bias and LoRA, and sums of dy W, of few rows and of many, in every format: against float64."""
    shape = ground.pick((640, 1536), (72, 128))
    for name, kind in STORAGES.items():
        here, there = _both(kind, shape, ground)
        w = here.unpack(torch.float32).double()
        for dtype in DTYPES:
            for rows in ground.pick((1, 5, 16, 17, 65, 300), (1, 17)):
                with found.case(what := f"{name} {dtype} {rows} rows"):
                    _products(found, what, there, w, rows, dtype, ground)


def _products(
    found: Findings, what: str, matrix: PackedWeight, w: Tensor, rows: int, dtype: torch.dtype, ground: Ground
) -> None:
    (n, k), generator = w.shape, torch.Generator().manual_seed(0)
    x, dy, a, b, bias, low = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((rows, k), (rows, n), (8, k), (n, 8), (n,), (rows, 8))
    )
    a, b = a.mul(0.05), b.mul(0.05)
    x64, dy64, a64, b64, bias64, low64 = (t.double() for t in (x, dy, a, b, bias, low))
    x, dy, a, b, bias, low = (t.to(ground.device) for t in (x, dy, a, b, bias, low))
    allowed = TOLERANCE[dtype]
    if isinstance(matrix, LlmInt8):
        allowed = max(allowed, 2e-2)  # x is rounded to 8 bits
    addition = Addition(bias.float(), a.float(), b.float(), 0.5)
    wanted = x64 @ w.t() + 0.5 * low64 @ b64.t() + bias64
    found.close(f"{what}, with LoRA and bias", multiply(x, matrix, addition, low), wanted, allowed)
    found.close(f"{what}, alone", multiply(x, matrix), x64 @ w.t(), allowed)
    summed = sum_of_products([dy, dy], [matrix, matrix], transposed=True, low=(low, a, 0.5))
    found.close(f"{what}, of gradients", summed, 2 * dy64 @ w + 0.5 * low64 @ a64, TOLERANCE[dtype])


@check(1)
def gradients_of_factors(ground: Ground, found: Findings) -> None:
    """Of LoRA's, from operands in 16 bits: on a card in fp32, which no rounding to 16 bits comes before."""
    for dtype in (torch.bfloat16, torch.float16):
        for rows, tokens, columns in ((16, 300, 1536), (4, 77, 260), (8, 1, 128)):
            with found.case(what := f"{dtype} {rows} x {tokens} x {columns}"):
                generator = torch.Generator().manual_seed(0)
                a, b = (torch.randn(tokens, n, generator=generator).to(dtype) for n in (rows, columns))
                made = gradient_product(a.to(ground.device).t(), b.to(ground.device), 0.5)
                found.expect(not ground.cuda or made.dtype == torch.float32, f"{what}: is {made.dtype}")
                found.close(what, made, 0.5 * a.t().double() @ b.double(), 1e-5 if ground.cuda else TOLERANCE[dtype])


@check(4)
def gemm_4bit(ground: Ground, found: Findings) -> None:
    """bitsandbytes' fused product with our nested statistics, of 1, 4 and 64 rows: against float64, and its rate."""
    operation = torch.ops.bitsandbytes.gemm_4bit.default
    for shape in ground.pick([(4096, 4096), (11008, 4096), (1024, 8192)], [(64, 128)]):
        for name in ("nf4", "nf4_single", "fp4"):
            here, there = _both(STORAGES[name], shape, ground)
            w = here.unpack(torch.float32).double()
            for dtype in (torch.bfloat16, torch.float16):
                for rows in (1, 4, 64):
                    with found.case(what := f"{name} {dtype} {rows} x {shape}"):
                        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
                        given = _for_gemm(there, x.to(ground.device))
                        # A CPU's kernel keeps scales in bf16.
                        allowed = TOLERANCE[dtype] if ground.cuda else 2e-2
                        found.close(what, operation(*given), x.double() @ w.t(), allowed)
                        if (dtype, name) == (torch.bfloat16, "nf4"):
                            seconds = seconds_of(lambda given=given: operation(*given), ground)
                            found.figures[f"{rows} x {shape[0]} x {shape[1]}"] = {
                                "us": round(1e6 * seconds, 1),
                                "of_copy": round(there.nbytes / seconds / copy_rate(ground), 2),
                            }


def _for_gemm(matrix: FourBitWeight, x: Tensor) -> tuple:
    """Arguments of the operation."""
    given = x, matrix.codes.view(-1, 1), list(matrix.shape)
    if not matrix.nested:
        return *given, matrix.scales, 64, matrix.quant_type
    # The 8-bit scales stand beside the scales of those.
    table = levels(True, x.device)
    return *given, matrix.nested_scales, 64, matrix.quant_type, None, matrix.scales, table, matrix.offset[0]


@check(2)
def moments(ground: Ground, found: Findings) -> None:
    """8-bit moments that are packed on the card unpack to those of the CPU, and lie as near to the values."""
    values = torch.randn(ground.pick(1 << 20, 1 << 12) + 77, generator=torch.Generator().manual_seed(0)) * 1e-3
    for signed in (True, False):
        with found.case(what := f"{'first' if signed else 'second'} moment"):
            given = values if signed else values.square()
            here = unpack_moment(*pack_moment(given, signed), signed)
            there = unpack_moment(*pack_moment(given.to(ground.device), signed), signed)
            found.close(what, there, here, 1e-3)
            errors = [float((one.cpu() - given).double().norm()) for one in (here, there)]
            found.expect(errors[1] <= 1.001 * errors[0], f"{what}: farther from the values than on a CPU")


@check(2)
def optimizers(ground: Ground, found: Findings) -> None:
    """Ten steps of every --optim against AdamW in float64; paged moments are in managed memory on a card."""
    for kind in OPTIMIZERS:
        with found.case(kind):
            narrow = kind == "adamw8bit"
            mine, theirs = _stepped(ground, kind), _stepped_in_float64(ground)
            for name, value in mine.items():
                start = _numbers(ground, name, 0)
                moved = theirs[name] - start.double()
                small = value.numel() < 4096  # bitsandbytes keeps small moments in 32 bits
                # bitsandbytes' kernels decay a weight after its step.
                allowed = 3e-2 if narrow and not small else 1e-4 if kind == "adamw" else 3e-3
                found.close(f"{kind}, what {name} moved by", value.cpu().double() - start.double(), moved, allowed)


_SHAPES = {"large": (330, 331), "small": (77,), "bias": (19,)}


def _numbers(ground: Ground, name: str, seed: int) -> Tensor:
    """Starting values (seed 0), or the gradient of a step."""
    generator = torch.Generator().manual_seed(1000 * seed + len(name))
    return torch.randn(_SHAPES[name], generator=generator) * (0.1 if seed == 0 else 1.0)


def _stepped(ground: Ground, kind: str) -> dict[str, Tensor]:
    parameters = {name: nn.Parameter(_numbers(ground, name, 0).to(ground.device)) for name in _SHAPES}
    optimizer = build_optimizer(kind, parameters, lr=1e-2, weight_decay=0.1)
    for step in range(1, 11):
        for name, parameter in parameters.items():
            parameter.grad = _numbers(ground, name, step).to(ground.device)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def _stepped_in_float64(ground: Ground) -> dict[str, Tensor]:
    """By the formula of Loshchilov & Hutter 2019."""
    found, (beta1, beta2), lr = {}, (0.9, 0.95), 1e-2
    for name in _SHAPES:
        value = _numbers(ground, name, 0).double()
        first = second = torch.zeros_like(value)
        for step in range(1, 11):
            gradient = _numbers(ground, name, step).double()
            first = beta1 * first + (1 - beta1) * gradient
            second = beta2 * second + (1 - beta2) * gradient.square()
            value = value * (1 - lr * 0.1)
            root = (second / (1 - beta2**step)).sqrt() + 1e-8
            value = value - lr * first / (1 - beta1**step) / root
        found[name] = value
    return found


def _both(kind: type[PackedWeight], shape: tuple[int, int], ground: Ground) -> tuple[PackedWeight, PackedWeight]:
    """The same packed matrix on the CPU and on the device."""
    here, there = kind(shape), kind(shape)
    # Packed on the device, where that takes less time; `packing` compares the two.
    there.pack(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(ground.device) * 0.02)
    here.adopt({name: part.detach().cpu() for name, part in there.named_parameters()})
    return here, there


CHECKS = [packing, unpacking, products, gradients_of_factors, gemm_4bit, moments, optimizers]
