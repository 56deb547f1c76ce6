"""Linears that read the same input: against plain formulas, and in what they keep."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from accessory.kernels.addition import Addition
from accessory.model.decoding import decoding
from accessory.model.projection import project
from accessory.model.recomputable import Recomputable
from accessory.quant import PackedWeight, storage
from accessory.quant.products import Matrix

TOKENS, INPUTS, WIDTHS, RANK = 7, 64, (32, 16), 4
STORAGES = (None, "nf4", "int8")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def matrix(kind: str | None, rows: int, seed: int, dtype: torch.dtype) -> Matrix:
    """A frozen matrix [rows, 64], plain or packed."""
    weight = random(rows, INPUTS, seed=seed, dtype=dtype)
    if kind is None:
        return weight
    packed = storage(kind)((rows, INPUTS))
    packed.pack(weight.float())
    return packed


def plain(weight: Matrix) -> Tensor:
    """What it multiplies with, in float64."""
    return (weight.unpack(torch.float32) if isinstance(weight, PackedWeight) else weight).double()


def products(kind: str | None, *, lora: bool, bias: bool, dropout: float, dtype: torch.dtype = torch.float64):
    """Two linears of one input: (weights, additions), with the trained tensors of both in a row."""
    weights, additions, leaves = [], [], []
    for i, width in enumerate(WIDTHS):
        a, b = (random(RANK, INPUTS, seed=10 + i), random(width, RANK, seed=20 + i)) if lora else (None, None)
        c = random(width, seed=30 + i) if bias else None
        a, b, c = (None if t is None else t.to(dtype).requires_grad_() for t in (a, b, c))
        leaves += [t for t in (a, b, c) if t is not None]
        additions.append(Addition(c, a, b, *((0.7, dropout, i) if lora else ())))
        weights.append(matrix(kind, width, i, torch.float64 if dtype == torch.float64 else torch.bfloat16))
    return (weights, additions), leaves


def written_out(x: Tensor, weight: Matrix, addition: Addition) -> Tensor:
    """The formula in float64, for autograd to differentiate."""
    y = x @ plain(weight).t()
    if addition.a is not None:
        dropped = x * addition.dropout_mask(x) if addition.dropout else x
        y = y + addition.scale * dropped @ addition.a.double().t() @ addition.b.double().t()
    return y if addition.bias is None else y + addition.bias.double()


CASES = [
    (kind, lora, bias, dropout)
    for kind, lora, bias, dropout in itertools.product(STORAGES, (False, True), (False, True), (0.0, 0.25))
    if lora or not dropout
]


@pytest.mark.parametrize(("kind", "lora", "bias", "dropout"), CASES)
def test_equals_the_formula_in_float64(kind: str | None, lora: bool, bias: bool, dropout: float) -> None:
    """Values, and the gradients of x, A, B and bias: finite differences, and autograd through the plain formula."""
    made, leaves = products(kind, lora=lora, bias=bias, dropout=dropout)
    x = random(TOKENS, INPUTS, seed=5).requires_grad_()
    found, wanted = project(x, *made), [written_out(x, *one) for one in zip(*made, strict=True)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    weights = [random(TOKENS, width, seed=40 + i) for i, width in enumerate(WIDTHS)]
    ours, theirs = (
        torch.autograd.grad(ys, [x, *leaves], weights, retain_graph=True) for ys in (found, wanted)
    )  # fmt: skip
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(lambda *_: project(x, *made), [x, *leaves], fast_mode=True)


@pytest.mark.parametrize(("kind", "lora", "bias", "dropout"), CASES)
def test_decoding_it_is_the_same(kind: str | None, lora: bool, bias: bool, dropout: float) -> None:
    """Bit for bit."""
    made, _ = products(kind, lora=lora, bias=bias, dropout=dropout)
    x = random(TOKENS, INPUTS, seed=5)
    wanted = project(x, *made)
    with torch.no_grad(), decoding():
        found = project(x, *made)
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def test_lora_is_neither_scaled_nor_dropped_out_of_unless_told() -> None:
    x, weight, a, b = (random(*shape) for shape in ((TOKENS, INPUTS), (32, INPUTS), (RANK, INPUTS), (32, RANK)))
    torch.testing.assert_close(project(x, [weight], [Addition(None, a, b)])[0], x @ (weight + b @ a).t())


@pytest.mark.parametrize(("kind", "lora", "bias", "dropout"), CASES)
def test_bf16_is_close_to_float64(kind: str | None, lora: bool, bias: bool, dropout: float) -> None:
    """fp32 trained tensors beside bf16: values and gradients within 1 % of their norm, gradients in fp32."""
    made, leaves = products(kind, lora=lora, bias=bias, dropout=dropout, dtype=torch.float32)
    x = random(TOKENS, INPUTS, seed=5, dtype=torch.bfloat16).requires_grad_()
    wide = x.detach().double().requires_grad_()
    found, wanted = project(x, *made), [written_out(wide, *one) for one in zip(*made, strict=True)]
    weights = [random(TOKENS, width, seed=40 + i, dtype=torch.bfloat16) for i, width in enumerate(WIDTHS)]
    ours = torch.autograd.grad(found, [x, *leaves], weights)
    theirs = torch.autograd.grad(wanted, [wide, *leaves], [w.double() for w in weights])
    assert {t.dtype for t in ours[1:]} <= {torch.float32}
    for one, other in zip((*found, *ours), (*wanted, *theirs), strict=True):
        assert (one.double() - other).norm() < 0.01 * other.norm()


def test_trained_matrices() -> None:
    """Plain weights that are trained, in x's dtype or as fp32 masters: against the formula."""
    x, dy = random(TOKENS, INPUTS, seed=5, dtype=torch.bfloat16).requires_grad_(), random(TOKENS, 32, seed=6)
    for dtype in (torch.bfloat16, torch.float32):
        weight = random(32, INPUTS, dtype=dtype).requires_grad_()
        (y,) = project(x, [weight])
        dx, dweight = torch.autograd.grad(y, [x, weight], dy.bfloat16())
        assert (y.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, dtype)
        narrow = weight.detach().bfloat16().double()
        for found, wanted in ((dx, dy @ narrow), (dweight, dy.t() @ x.double())):
            assert (found.double() - wanted).norm() < 0.01 * wanted.norm()


def kept(x: Tensor | Recomputable, made: tuple[list[Matrix], list[Addition]]) -> list[Tensor]:
    """What waits for the backward."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        project(x, *made)
    return saved


@pytest.mark.parametrize("kind", STORAGES)
def test_biases_alone_keep_nothing_of_x(kind: str | None) -> None:
    """Nor an unpacked matrix: parameters only."""
    made, leaves = products(kind, lora=False, bias=True, dropout=0.0)
    x = random(TOKENS, INPUTS).requires_grad_()
    own = {t.data_ptr() for t in leaves} | {w.data_ptr() for w in made[0] if isinstance(w, Tensor)}
    assert {t.data_ptr() for t in kept(x, made)} == own


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_lora_keeps_x_once_and_r_numbers_a_token(dropout: float) -> None:
    """No mask, no second x."""
    made, leaves = products("nf4", lora=True, bias=True, dropout=dropout)
    x = random(TOKENS, INPUTS).requires_grad_()
    saved = [t for t in kept(x, made) if t.data_ptr() not in {leaf.data_ptr() for leaf in leaves}]
    assert [tuple(t.shape) for t in saved] == [(TOKENS, INPUTS), (TOKENS, RANK), (TOKENS, RANK)]
    assert saved[0].data_ptr() == x.data_ptr()


def test_what_can_be_made_again_is_not_kept() -> None:
    """x that is twice something: that is kept, and the gradients are the same."""
    made, leaves = products("nf4", lora=True, bias=False, dropout=0.0)
    half = random(TOKENS, INPUTS)
    x = (2 * half).requires_grad_()
    source = Recomputable(x, (half,), lambda given: 2 * given)
    assert x.data_ptr() not in {t.data_ptr() for t in kept(source, made)}
    ours, plainly = (
        torch.autograd.grad([y.sum() for y in project(given, *made)], [x, *leaves]) for given in (source, x)
    )
    assert all(torch.equal(one, other) for one, other in zip(ours, plainly, strict=True))


@pytest.mark.parametrize("kind", STORAGES)
def test_unread_outputs_have_the_same_gradients(kind: str | None) -> None:
    """As where a block runs again for its backward: skipped outputs have the right shapes, whatever they hold."""
    made, leaves = products(kind, lora=True, bias=True, dropout=0.25)
    x = random(TOKENS, INPUTS, seed=5).requires_grad_()
    read, skipped = project(x, *made), project(x, *made, skip_output=True)
    assert [(y.shape, y.dtype) for y in skipped] == [(y.shape, y.dtype) for y in read]
    weights = [random(TOKENS, width, seed=40 + i) for i, width in enumerate(WIDTHS)]
    ours, theirs = (torch.autograd.grad(ys, [x, *leaves], weights) for ys in (skipped, read))
    assert all(map(torch.equal, ours, theirs))


def test_a_frozen_a_under_dropout() -> None:
    """B alone learns; x is not kept for it."""
    made, _ = products("nf4", lora=True, bias=False, dropout=0.25)
    x = random(TOKENS, INPUTS, seed=5)
    for addition in made[1]:
        addition.a.requires_grad_(False)
    factors = [addition.b for addition in made[1]]
    assert x.data_ptr() not in {t.data_ptr() for t in kept(x, made)}
    weights = [random(TOKENS, width, seed=40 + i) for i, width in enumerate(WIDTHS)]
    for ours, theirs in zip(
        torch.autograd.grad(project(x, *made), factors, weights),
        torch.autograd.grad([written_out(x, *one) for one in zip(*made, strict=True)], factors, weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_an_input_without_gradient() -> None:
    """The lowest layer: A and B learn, nothing goes further down; without anything trained there is no graph."""
    made, leaves = products("nf4", lora=True, bias=True, dropout=0.0)
    x = random(TOKENS, INPUTS)
    sum(y.sum() for y in project(x, *made)).backward()
    assert all(leaf.grad is not None for leaf in leaves)
    frozen, _ = products("nf4", lora=False, bias=False, dropout=0.0)
    assert not any(y.requires_grad for y in project(x, *frozen))


def test_backward_reads_a_packed_matrix_again() -> None:
    """Memory given up after the forward and gathered elsewhere, as a sharded base is, still serves the backward."""
    made, _ = products("nf4", lora=False, bias=False, dropout=0.0, dtype=torch.float32)
    x = random(TOKENS, INPUTS, dtype=torch.float32).requires_grad_()
    ys = project(x, *made)
    wanted = sum(torch.ones(TOKENS, width) @ plain(w).float() for width, w in zip(WIDTHS, made[0], strict=True))
    for weight in made[0]:
        for parameter in weight.parameters():
            moved = parameter.detach().clone()
            parameter.detach().zero_()
            parameter.data = moved
    sum(y.sum() for y in ys).backward()
    torch.testing.assert_close(x.grad, wanted)


@pytest.mark.parametrize("kernels_wanted", ["0", "1"])
def test_bias_gradient_is_summed_in_fp32(switch_cpu_kernels: Callable[[bool], None], kernels_wanted: str) -> None:
    """4,097 ones: a bf16 sum would stop at 256 or round to 4,096."""
    switch_cpu_kernels(kernels_wanted == "1")
    bias = torch.zeros(2, requires_grad=True)
    (y,) = project(torch.zeros(4097, 3, dtype=torch.bfloat16), [torch.zeros(2, 3).bfloat16()], [Addition(bias)])
    y.backward(torch.ones(4097, 2, dtype=torch.bfloat16))
    assert bias.grad.tolist() == [4097.0, 4097.0]


@pytest.mark.usefixtures("needs_cpu_kernels")
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(("lora", "bias"), [(False, False), (True, False), (False, True), (True, True)])
def test_few_rows_that_are_prepared(lora: bool, bias: bool, dropout: float) -> None:
    """Without a gradient, by the kernel for them with all that stands beside; what drops out, as with a gradient."""
    made, _ = products("nf4", lora=lora, bias=bias, dropout=dropout, dtype=torch.float32)
    first, *others = made[0]
    first.prepare_decoding(others)
    x = random(TOKENS, INPUTS, seed=5).bfloat16()
    with torch.no_grad(), decoding():
        found = project(x, *made)
        by_kernel = first.decode_products(x, others, made[1])
    wanted = project(x, *made) if lora and dropout else by_kernel
    for one, other, *product in zip(found, wanted, *made, strict=True):
        assert torch.equal(one, other)
        exact = written_out(x.double(), *product)
        assert (one.double() - exact).norm() < 0.01 * exact.norm()
