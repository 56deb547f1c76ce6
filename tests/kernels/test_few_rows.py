"""Products of few rows with 4-bit matrices on a GPU: both ways, on the CPU, against the unpacked matrices."""

from __future__ import annotations

from types import SimpleNamespace

import bitsandbytes.functional as bnb
import pytest
import torch

from accessory.kernels.addition import Addition
from accessory.kernels.codes import Codes
from accessory.kernels.few_rows import ALWAYS_FUSED, JoinedGroups, JoinedMatrices
from accessory.kernels.plain import decoding_groups, decoding_products, group_codes
from accessory.kernels.plain.four_bit import dequantize
from accessory.quant.four_bit import Nf4
from accessory.quant.groups import group_storage

WAYS = {"bitsandbytes": lambda device, dtype: None, "a kernel": lambda device, dtype: decoding_products}
LEVELS = bnb.create_dynamic_map()  # of nested scales: one for all matrices
GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=GENERATOR)


def codes(n: int, *, columns: int = 192, nested: bool = True) -> Codes:
    """A random matrix [n, columns]."""
    packed, state = bnb.quantize_4bit(
        randn(n, columns) * 0.05, blocksize=64, compress_statistics=nested, quant_type="nf4"
    )
    more = (LEVELS, state.state2.absmax, state.offset.view(1)) if nested else None
    return Codes((n, columns), packed.flatten(), state.code, state.absmax, more)


def lora(n: int, rank: int) -> dict[str, torch.Tensor | float]:
    """Factors and scale."""
    return {"a": randn(rank, 192), "b": randn(n, rank), "scale": 0.5}


CASES = {
    "bare": [Addition(), Addition()],
    "biases": [Addition(randn(40)), Addition()],
    "lora": [Addition(**lora(40, 3)), Addition(**lora(72, 5))],
    "some": [Addition(randn(40)), Addition(randn(72), **lora(72, 20))],
}


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [1, 3])
def test_equals_the_unpacked(rows: int, way: str, nested: bool) -> None:
    """With every addition, which is laid out once."""
    matrices, x = [codes(40, nested=nested), codes(72, nested=nested)], randn(rows, 192)
    weights = [dequantize(matrix, torch.empty(matrix.shape)) for matrix in matrices]
    for name, added in CASES.items():
        joined = JoinedMatrices(matrices, WAYS[way])
        assert joined.takes(x)
        found = joined.multiply(x, None if name == "bare" else added)
        for y, weight, one in zip(found, weights, added, strict=True):
            wanted = x @ weight.t()
            wanted = wanted if one.bias is None else wanted + one.bias
            wanted = wanted if one.a is None else wanted + one.scale * (x @ one.a.t()) @ one.b.t()
            torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
        before = joined._laid_out._added
        joined.multiply(x, None if name == "bare" else added)
        assert joined._laid_out._added is before


def test_whole_numbers_in_groups() -> None:
    """In their own order by a kernel; others, and where there is no kernel, not."""
    storage, (x, added) = group_storage(4, 32), (randn(2, 192), [Addition(randn(40), **lora(40, 3)), Addition()])
    matrices = []
    for rows in (40, 16):
        weight = storage((rows, 192))
        weight.pack(randn(rows, 192))
        matrices.append(weight.as_codes())
    kernel = SimpleNamespace(multiply=decoding_groups.multiply, takes=lambda w: w.order is None)
    joined = JoinedGroups(matrices, lambda device, dtype: kernel)
    assert joined.takes(x) and not joined.takes(randn(17, 192))
    assert not JoinedGroups(matrices, lambda device, dtype: None).takes(x)
    assert not JoinedGroups([matrices[0]._replace(order=torch.arange(192))], lambda device, dtype: kernel).takes(x)
    for y, w, one in zip(joined.multiply(x, added), matrices, added, strict=True):
        wanted = x @ group_codes.dequantize(w, torch.empty(w.shape)).t()
        wanted = wanted if one.a is None else wanted + one.bias + one.scale * (x @ one.a.t()) @ one.b.t()
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)


def test_changed_factors_are_laid_out_again() -> None:
    """What training did to them in place."""
    joined, x, one = JoinedMatrices([codes(40)], WAYS["bitsandbytes"]), randn(1, 192), Addition(**lora(40, 4))
    (before,) = joined.multiply(x, [one])
    one.b.neg_()
    (after,) = joined.multiply(x, [one])
    (bare,) = joined.multiply(x)
    torch.testing.assert_close(before + after, 2 * bare, rtol=1e-4, atol=1e-4)


def test_what_a_fused_optimizer_changed_is_laid_out_for_the_next_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes no tensor's version, and a model may be asked between steps without being told of them."""
    one, x = Addition(**lora(40, 4)), randn(1, 192)
    factors = [factor.requires_grad_() for factor in (one.a, one.b)]
    weight, matrix = Nf4((40, 192)), codes(40)
    weight.prepared = JoinedMatrices([matrix], WAYS["a kernel"])
    monkeypatch.setattr(Nf4, "codes", SimpleNamespace(is_cuda=True), raising=False)
    optimizer = torch.optim.AdamW(factors, lr=0.1, fused=True)
    for _ in range(2):
        weight.prepare_decoding([])
        with torch.no_grad():
            (found,) = weight.prepared.multiply(x, [one])
            wanted = x @ dequantize(matrix, torch.empty(40, 192)).t() + 0.5 * (x @ one.a.t()) @ one.b.t()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        for factor in factors:
            factor.grad = torch.ones_like(factor)
        optimizer.step()


def test_what_is_taken() -> None:
    """Few rows; matrices of one kind, whose rows are whole blocks."""
    bare, other = (JoinedMatrices([codes(40)], find) for find in WAYS.values())
    assert bare.takes(randn(ALWAYS_FUSED, 192)) and not bare.takes(randn(ALWAYS_FUSED + 1, 192))
    assert other.takes(randn(16, 192)) and not other.takes(randn(17, 192)) and not other.takes(randn(0, 192))
    assert not bare.takes(randn(1, 192).double()) and not bare.takes(randn(192, 2).t())
    assert JoinedMatrices.can([codes(40), codes(8)])
    assert not JoinedMatrices.can([codes(40), codes(8, nested=False)])
    assert not JoinedMatrices.can([codes(40, columns=96)])
