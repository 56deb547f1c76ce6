"""That each kernel's fault is found where it would show: in any one of its results."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from accessory.kernels import avx512
from accessory.kernels.avx512 import (
    cached_attention,
    column_sums,
    cross_entropy,
    document_attention,
    four_bit_gemv,
    four_bit_product,
    gate,
    group_codes,
    group_codes_gemv,
    group_codes_product,
    rms_norm,
    rotary,
)
from accessory.kernels.cross_entropy_steps import in_two_steps
from accessory.kernels.trial import wrong_kernels

RESULTS = [
    (cached_attention, "attend", None),
    (column_sums, "column_sums", None),
    *((cross_entropy, "statistics", i) for i in range(3)),
    (cross_entropy, "become_gradient", None),
    (document_attention, "forward", None),
    *((document_attention, "backward", i) for i in range(3)),
    *((four_bit_gemv.Matrices, "multiply", i) for i in range(2)),
    (four_bit_product, "sum_of_products", None),
    (gate, "forward", None),
    *((gate, "backward", i) for i in range(2)),
    (group_codes, "dequantize", None),
    *((group_codes_gemv.Matrices, "multiply", i) for i in range(3)),
    (group_codes_product, "sum_of_products", None),
    (rms_norm, "normalized", None),
    (rms_norm, "forward", 0),
    (rms_norm, "recompute", None),
    *((rms_norm, "backward", i) for i in range(2)),
    (rotary, "rotate", None),
]


def found() -> list[str]:
    """What the trial finds wrong."""
    return wrong_kernels("avx512", avx512.KERNELS, torch.device("cpu"), torch.bfloat16)


def test_all_are_tried_and_right() -> None:
    """None is wrong, and a fault of every kernel is among those below."""
    assert found() == []
    assert {kernel_of(owner) for owner, *_ in RESULTS} == set(avx512.KERNELS)


def kernel_of(owner: ModuleType | type) -> str:
    """The name of its file."""
    return getattr(owner, "__module__", owner.__name__).rpartition(".")[2]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_whatever_torchs_defaults_are(default: torch.dtype) -> None:
    """Another dtype, another device, and inference."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        with torch.device("meta"), torch.inference_mode():
            assert found() == []
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(("owner", "name", "result"), RESULTS)
def test_wrong_by_a_twentieth(
    monkeypatch: pytest.MonkeyPatch, owner: ModuleType | type, name: str, result: int | None
) -> None:
    """It is named, and no other."""
    right = getattr(owner, name)

    def wrong(*given: object, **named: object) -> object:
        found = right(*given, **named)
        if found is None:
            return given[0].mul_(1.05)
        return found * 1.05 if result is None else [t * 1.05 if i == result else t for i, t in enumerate(found)]

    monkeypatch.setattr(owner, name, wrong)
    if owner is cross_entropy:  # whose two steps are bound together
        together = in_two_steps(cross_entropy.statistics, cross_entropy.become_gradient)
        monkeypatch.setattr(cross_entropy, "losses_and_gradient", together)
    assert found() == [kernel_of(owner)]
