"""What no kernel may be given: it has addresses only, and would read or write other memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from accessory.kernels.addition import Addition
from accessory.kernels.avx512 import (
    cached_attention,
    cross_entropy,
    document_attention,
    four_bit_gemv,
    four_bit_product,
    gate,
    rms_norm,
    rotary,
)
from accessory.kernels.avx512.column_sums import column_sums
from accessory.kernels.codes import Codes
from accessory.kernels.documents import Documents
from accessory.kernels.operands import address, contiguous, made


def bf16(*shape: int) -> Tensor:
    """Random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float = 1.0, window: int | None = None) -> Tensor:
    """In one document of 8 tokens."""
    return document_attention.forward(q, k, v, Documents.build((8,)), window, scale)


def attend_cached(
    q: Tensor, keys: Tensor, counts: tuple[int, ...] = (5, 5), *, scale: float = 1.0, window: int | None = None
) -> Tensor:
    """To values that are the keys."""
    return cached_attention.attend(q, keys, keys, counts, window, scale)


LABELS, ONES = torch.zeros(3, dtype=torch.int64), torch.ones(3)


def codes_of(shape: tuple[int, int]) -> Codes:
    """A matrix of zeros."""
    numbers = shape[0] * shape[1]
    codes = torch.zeros(numbers // 2, dtype=torch.uint8)
    return Codes(shape, codes, torch.zeros(16), torch.zeros(numbers // 64), None)


def multiply(x: Tensor, shape: tuple[int, int], **more: object) -> Tensor:
    """By such a matrix."""
    return four_bit_product.sum_of_products([x], [codes_of(shape)], transposed=False, **more)


def few(x: Tensor, *shapes: tuple[int, int], **beside: Tensor) -> tuple[Tensor, ...]:
    """By such matrices, beside the first of which something stands."""
    first, *others = [Addition(**beside), *[Addition()] * (len(shapes) - 1)]
    return four_bit_gemv.Matrices([codes_of(shape) for shape in shapes]).multiply(x, [first, *others])


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "fewer queries": (
        lambda: attend(bf16(7, 4, 16), bf16(8, 2, 16), bf16(8, 2, 16)),
        r"q is \[7, 4, 16\]; expected \[8",
    ),
    "more queries": (lambda: attend(bf16(9, 4, 16), bf16(8, 2, 16), bf16(8, 2, 16)), r"q is \[9, 4, 16\]"),
    "other values": (lambda: attend(bf16(8, 4, 16), bf16(8, 2, 16), bf16(8, 1, 16)), r"v is \[8, 1, 16\]"),
    "fp32 keys": (lambda: attend(bf16(8, 4, 16), bf16(8, 2, 16).float(), bf16(8, 2, 16)), "k is torch.float32 on cpu"),
    "heads": (lambda: attend(bf16(8, 5, 16), bf16(8, 2, 16), bf16(8, 2, 16)), "5 heads for 2 of keys, of 16 channels"),
    "odd heads": (lambda: attend(bf16(8, 4, 7), bf16(8, 2, 7), bf16(8, 2, 7)), "of 7 channels each"),
    "scale": (lambda: attend(bf16(8, 4, 16), bf16(8, 2, 16), bf16(8, 2, 16), scale=-1.0), "scale -1.0"),
    "window": (lambda: attend(bf16(8, 4, 16), bf16(8, 2, 16), bf16(8, 2, 16), window=0), "window 0"),
    "more documents": (lambda: attend_cached(bf16(3, 4, 16), bf16(2, 8, 2, 16)), r"q is \[3, 4, 16\]; expected \[2, 4"),
    "cached heads": (lambda: attend_cached(bf16(2, 5, 16), bf16(2, 8, 2, 16)), "5 heads for 2 of keys"),
    "a cached scale": (lambda: attend_cached(bf16(2, 4, 16), bf16(2, 8, 2, 16), scale=-1.0), "scale -1.0"),
    "a cached window": (lambda: attend_cached(bf16(2, 4, 16), bf16(2, 8, 2, 16), window=0), "window 0"),
    "fewer counts": (
        lambda: attend_cached(bf16(2, 4, 16), bf16(2, 8, 2, 16), (5,)),
        r"keys \(5,\); expected 2, of 1 to 8",
    ),
    "more keys": (lambda: attend_cached(bf16(2, 4, 16), bf16(2, 8, 2, 16), (5, 9)), r"keys \(5, 9\); expected 2, of 1"),
    "no keys": (lambda: attend_cached(bf16(2, 4, 16), bf16(2, 8, 2, 16), (0, 8)), r"keys \(0, 8\); expected 2, of 1"),
    "a gate's other": (lambda: gate.forward(bf16(3, 8), bf16(2, 8), "silu"), r"up is \[2, 8\]; expected \[3, 8\]"),
    "a gate in fp32": (
        lambda: gate.backward(bf16(3, 8), bf16(3, 8), bf16(3, 8).float(), "silu"),
        "up is torch.float32",
    ),
    "a norm's weight": (lambda: rms_norm.forward(bf16(3, 8), torch.ones(4), 1e-5), r"weight is \[4\]; expected \[8\]"),
    "a norm's scale": (lambda: rms_norm.recompute(bf16(3, 8), torch.ones(8), torch.ones(2, 1)), r"scale is \[2, 1\]"),
    "a norm's gradient": (
        lambda: rms_norm.backward(bf16(3, 8).float(), bf16(3, 8), torch.ones(8), torch.ones(3, 1)),
        "dy is torch.float32",
    ),
    "fewer angles": (
        lambda: rotary.rotate(bf16(9, 2, 8), torch.ones(1, 1, 4, dtype=torch.complex64)),
        r"rotations is \[1, 1, 4",
    ),
    "more angles": (lambda: rotary.rotate(bf16(9, 2, 8), torch.ones(9, 1, 5, dtype=torch.complex64)), "10 channels"),
    "wide angles": (lambda: rotary.rotate(bf16(9, 2, 8), torch.ones(9, 1, 4, dtype=torch.complex128)), "complex128"),
    "scores in fp32": (lambda: cross_entropy.statistics(bf16(3, 8).float(), LABELS), "scores is torch.float32 on cpu"),
    "fewer labels": (lambda: cross_entropy.statistics(bf16(4, 8), LABELS), r"local is \[3\]; expected \[4\]"),
    "narrow labels": (lambda: cross_entropy.statistics(bf16(3, 8), LABELS.int()), "local is torch.int32"),
    "columns apart": (lambda: cross_entropy.statistics(bf16(8, 3).t(), LABELS), "adjacent columns"),
    "one row for all": (lambda: cross_entropy.statistics(bf16(1, 8).expand(3, 8), LABELS), "rows for themselves"),
    "padding": (lambda: cross_entropy.statistics(bf16(3, 8), LABELS, -1), "width -1"),
    "mass": (lambda: cross_entropy.become_gradient(bf16(3, 8), LABELS, ONES, ONES[:2]), r"mass is \[2\]"),
    "highest": (
        lambda: cross_entropy.become_gradient(bf16(3, 8), LABELS, ONES.double(), ONES),
        "highest is torch.float64",
    ),
    "sums": (lambda: column_sums(bf16(3, 8).float()), "x is torch.float32 on cpu"),
    "elsewhere": (lambda: column_sums(torch.empty(3, 8, dtype=torch.bfloat16, device="meta")), "on meta"),
    "columns": (lambda: multiply(bf16(3, 64), (4, 128)), r"a factor is \[3, 64\]; expected \[3, 128\]"),
    "blocks": (lambda: multiply(bf16(3, 96), (4, 96)), r"a matrix of \[4, 96\]; expected even rows of whole blocks"),
    "unequal widths": (
        lambda: four_bit_product.sum_of_products(
            [bf16(3, 4)] * 2, [codes_of((4, 128)), codes_of((4, 64))], transposed=True
        ),
        "results of unequal widths",
    ),
    "no rows": (lambda: multiply(bf16(3, 64), (0, 64)), r"a matrix of \[0, 64\]"),
    "bias": (lambda: multiply(bf16(3, 64), (4, 64), bias=torch.ones(3)), r"bias is \[3\]; expected \[4\]"),
    "low": (
        lambda: multiply(bf16(3, 64), (4, 64), low=(bf16(3, 2), torch.ones(2, 4), 1.0)),
        r"low factor is \[2, 4\]; expected \[4, 2\]",
    ),
    "columns of few rows": (lambda: few(bf16(3, 64), (4, 128)), r"x is \[3, 64\]; expected \[3, 128\]"),
    "few rows in fp32": (lambda: few(bf16(3, 64).float(), (4, 64)), "x is torch.float32 on cpu"),
    "unlike columns": (lambda: few(bf16(3, 64), (4, 64), (4, 128)), "expected as many columns in each"),
    "blocks of few rows": (lambda: few(bf16(3, 96), (4, 96)), r"a matrix of \[4, 96\]; expected even rows"),
    "a bias of few rows": (lambda: few(bf16(3, 64), (4, 64), bias=torch.ones(3)), r"bias is \[3\]; expected \[4\]"),
    "a": (
        lambda: few(bf16(3, 64), (4, 64), a=torch.ones(2, 32), b=torch.ones(4, 2)),
        r"a is \[2, 32\]; expected \[2, 64\]",
    ),
    "b": (
        lambda: few(bf16(3, 64), (4, 64), a=torch.ones(2, 64), b=torch.ones(2, 4)),
        r"b is \[2, 4\]; expected \[4, 2\]",
    ),
    "too little beside": (
        lambda: four_bit_gemv.Matrices([codes_of((4, 64))] * 2).multiply(bf16(3, 64), [Addition()]),
        "1 biases and LoRAs for 2 matrices",
    ),
    "rows of low": (
        lambda: multiply(bf16(3, 64), (4, 64), low=(bf16(2, 2), torch.ones(4, 2), 1.0)),
        r"low is \[2, 2\]; expected \[3, 2\]",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    """By name, before the call."""
    call, said = REFUSED[kind]
    with pytest.raises(AssertionError, match=said):
        call()


def test_no_address_of_a_tensor_without_memory() -> None:
    """A fake one says that it is on the CPU."""
    with FakeTensorMode(), pytest.raises(AssertionError, match="FakeTensorMode"):
        address(torch.empty(3))
    assert address(None) is None


def test_made_and_whole() -> None:
    """Whatever the default device is; what is whole is not copied."""
    with torch.device("meta"):
        assert made((2, 3)).device.type == "cpu"
    x = bf16(4, 6)
    assert contiguous(x, (4, 6), "x") is x
    assert contiguous(x.t(), (6, 4), "x").is_contiguous()
