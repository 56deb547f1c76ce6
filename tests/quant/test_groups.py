"""Codes in groups against formulas in float64: numbers, products, slices, and how near the fit comes."""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from accessory.checkpoint.lazy import HeldTensor, PackedTensor, cut
from accessory.errors import CheckpointError
from accessory.model.projection import project
from accessory.quant import group_fit
from accessory.quant.groups import BITS, FEWEST, GROUPS, GroupWeight, group_storage
from tests.memory.allocated_peak import AllocatedPeak

KINDS = list(product(BITS, GROUPS))
WIDTHS = (1, 5, 63, 100, 192, 576)
VARIANTS = ((), ("points",), ("order",), ("channel_scale",), ("points", "order", "channel_scale"))
ROWS = 12


def generator(seed: int = 0) -> torch.Generator:
    """Of the same numbers each time."""
    return torch.Generator().manual_seed(seed)


def parts(bits: int, group: int, columns: int, also: tuple[str, ...] = (), rows: int = ROWS) -> dict[str, Tensor]:
    """A random matrix [rows, columns] as its file would hold it; bits past the last column are random too."""
    g, groups = generator(bits * group + columns), -(-columns // group)
    bytes_ = {"codes": -(-columns // (2 if bits == 4 else 4))} | ({"high": -(-columns // 8)} if bits == 3 else {})
    found = {name: torch.randint(256, (rows, n), generator=g, dtype=torch.uint8) for name, n in bytes_.items()}
    found["scales"] = torch.rand(rows, groups, generator=g).add(0.1).half()
    if "points" in also:
        found["points"] = torch.randint(17, (rows, groups), generator=g, dtype=torch.uint8)
    else:
        found["zeros"] = torch.randn(rows, groups, generator=g).half()
    if "order" in also:
        found["order"] = torch.randperm(columns, generator=g).int()
    if "channel_scale" in also:
        found["channel_scale"] = torch.rand(columns, generator=g).add(0.5).half()
    return found


def bits_of(rows: Tensor, columns: int, width: int) -> Tensor:
    """Bytes [N, ...] -> numbers of `width` bits, float64 [N, columns], the first in the lowest bits."""
    apart = np.unpackbits(rows.numpy(), axis=1, bitorder="little").astype(float).reshape(len(rows), -1, width)
    return torch.tensor(apart @ 2.0 ** np.arange(width))[:, :columns]


def exact(state: dict[str, Tensor], bits: int, group: int, columns: int) -> Tensor:
    """W in float64, from the bits."""
    q = bits_of(state["codes"], columns, 4 if bits == 4 else 2)
    q += 4 * bits_of(state["high"], columns, 1) if bits == 3 else 0
    own = torch.arange(columns) // group
    scale = state["scales"].double()[:, own]
    if "points" in state:
        w = (q - state["points"].double()[:, own]) * scale
    else:
        w = q * scale - state["zeros"].double()[:, own]
    if "order" in state:
        w = w[:, state["order"].argsort()]
    return w * state.get("channel_scale", torch.ones(columns)).double()


def matrix(bits: int, group: int, columns: int, also: tuple[str, ...] = (), rows: int = ROWS) -> GroupWeight:
    """The random one."""
    weight = group_storage(bits, group, also)((rows, columns))
    weight.adopt(parts(bits, group, columns, also, rows))
    return weight


@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_weights_are_the_formula(bits: int, group: int) -> None:
    """In every width and variant, in fp32 to its last digits, and narrower as fp32 rounded."""
    for columns, also in product(WIDTHS, VARIANTS):
        wanted = exact(parts(bits, group, columns, also), bits, group, columns)
        found = matrix(bits, group, columns, also)
        torch.testing.assert_close(found.unpack(torch.float32).double(), wanted, rtol=2**-22, atol=2**-22)
        assert torch.equal(found.unpack(torch.float64).float(), found.unpack(torch.float32))
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(found.unpack(dtype), found.unpack(torch.float32).to(dtype))


@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 0.01)])
def test_product_and_its_gradient(bits: int, group: int, dtype: torch.dtype, tolerance: float) -> None:
    """Through the linear's own autograd function, of matrices that share an input, and decoding."""
    for columns, also in product((63, 192), ((), ("points", "order", "channel_scale"))):
        weights = [matrix(bits, group, columns, also), matrix(bits, group, columns, rows=5)]
        wide = [exact(parts(bits, group, columns, *how), bits, group, columns) for how in ((also,), ((), 5))]
        x = torch.randn(9, columns, generator=generator(1)).to(dtype).requires_grad_()
        gradients = [torch.randn(9, len(w), generator=generator(2)).to(dtype) for w in wide]
        found = project(x, weights)
        torch.autograd.backward(found, gradients)
        dx = sum(dy.double() @ w for dy, w in zip(gradients, wide, strict=True))
        with torch.no_grad():
            decoded = project(x[:2], weights)
        for y, few, w in zip(found, decoded, wide, strict=True):
            assert (y.double() - x.double() @ w.t()).norm() <= tolerance * (x.double() @ w.t()).norm()
            assert (few.double() - y[:2].double()).norm() <= tolerance * y[:2].double().norm()
        assert (x.grad.double() - dx).norm() <= tolerance * dx.norm()


def cuts(columns: int, ranks: int) -> list[tuple[int, int, int]]:
    """By columns."""
    width = columns // ranks
    return [(1, rank * width, (rank + 1) * width) for rank in range(ranks)]


@pytest.mark.parametrize("also", VARIANTS)
@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 32), (4, 128)])
def test_slices_of_ranks_are_slices_of_the_whole(bits: int, group: int, also: tuple[str, ...]) -> None:
    """Rows, and columns at the edges of groups and inside them; chosen rows too. Every rank has as many bytes."""
    for columns, ranks in ((256, 2), (576, 2), (576, 3), (720, 6), (144, 2)):
        state, whole = parts(bits, group, columns, also), matrix(bits, group, columns, also).unpack(torch.float32)
        rows, sizes = torch.randperm(ROWS, generator=generator())[:7], set()
        for span in (*cuts(columns, ranks), (0, 3, 7)):
            for chosen, wanted in ((None, whole), (rows, whole[rows])):
                wanted = wanted.narrow(span[0], span[1], span[2] - span[1])
                kind = group_storage(bits, group, also)
                ours = kind.of_range(columns, span)(tuple(wanted.shape))
                size = ours.nbytes
                ours.adopt(kind.cut(state, columns, "w", chosen, span))
                assert torch.equal(ours.unpack(torch.float32), wanted)
                assert ours.nbytes == size
                sizes.add((span[0], len(wanted), size))
        assert len(sizes) == 3  # two numbers of rows of a column slice, one of a row slice


def test_a_cut_through_bytes_is_refused() -> None:
    """And so are groups that would be too small; of channels in another order, any are chosen."""
    state = parts(2, 64, 192)
    for start, stop in ((0, 63), (4, 64), (0, 4)):
        message = f"w: its 192 columns are packed in blocks of {FEWEST} that cannot be cut at {start}:{stop}"
        with pytest.raises(CheckpointError, match=message):
            group_storage(2, 64).cut(state, 192, "w", span=(1, start, stop))
    also = ("order",)
    cut = group_storage(2, 64, also).cut(parts(2, 64, 192, also), 192, "w", span=(1, 3, 66))
    assert cut["codes"].shape == (ROWS, 16) and cut["order"].sort().values.equal(torch.arange(63).int())


@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_packing_a_slice_is_cutting_what_is_packed(bits: int, group: int) -> None:
    """By rows, and by columns, also inside groups: every rank packs what the whole has."""
    for columns, ranks in ((576, 2), (288, 3), (192, 4)):
        weight, kind = torch.randn(8, columns, generator=generator()), group_storage(bits, group)
        whole = kind(tuple(weight.shape))
        whole.pack(weight)
        state = {part: value.detach() for part, value in whole.named_parameters()}
        for span in (*cuts(columns, ranks), (0, 2, 5)):
            dim, start, stop = span
            ours = kind.of_range(columns, span)(tuple(weight.narrow(dim, start, stop - start).shape))
            ours.pack_range(partial(cut, weight), columns, span)
            for part, value in kind.cut(state, columns, "w", span=span).items():
                assert torch.equal(getattr(ours, part), value), (part, span)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's result does not depend on others; bf16 weights are those numbers in fp32."""
    weight = torch.randn(37, 200, generator=generator()).bfloat16()
    wanted = group_fit.fit(weight, 3, 64)
    monkeypatch.setattr(group_fit, "PIECE", 1)
    for found, expected in zip(group_fit.fit(weight.float(), 3, 64), wanted, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", BITS)
def test_fit_is_near_the_best(bits: int) -> None:
    """Of groups of 64: at most 2 % above the best of 576 scales and zeros, each with its nearest codes."""
    w, top = torch.randn(64, 100, generator=generator(bits)), 2**bits - 1
    codes, scales, zeros = group_fit.fit_groups(w, bits)
    found = (codes.float() * scales.float() - zeros.float() - w).square().sum(0)
    low, reach = w.amin(0), w.amax(0) - w.amin(0)
    best = torch.full((100,), torch.inf)
    for start, stop in product(torch.linspace(0, 0.4, 24), torch.linspace(0, 0.4, 24)):
        scale, zero = reach * (1 - start - stop) / top, -(low + start * reach)
        nearest = ((w + zero) / scale).round().clamp(0, top)
        best = torch.minimum(best, (nearest * scale - zero - w).square().sum(0))
    assert found.mean() <= 1.02 * best.mean()
    assert (found <= 1.5 * best).all()


@pytest.mark.parametrize("bits", BITS)
def test_nothing_better_is_beside_it(bits: int) -> None:
    """Codes are the nearest ones to the statistics as they are kept, and least squares has no more to gain."""
    w = torch.randn(64, 50, generator=generator()).double()
    codes, scales, zeros = group_fit.fit_groups(w.float(), bits)
    q, s, z = codes.double(), scales.double(), zeros.double()
    found = (q * s - z - w).square()
    for step in (-1, 1):
        beside = (q + step).clamp(0, 2**bits - 1)
        assert ((beside * s - z - w).square() >= found - 1e-6).all()
    system = torch.stack([q.t(), -torch.ones_like(q).t()], 2)
    best = torch.linalg.lstsq(system, w.t()[:, :, None]).solution
    least = (system @ best - w.t()[:, :, None]).square().sum((1, 2))
    assert found.sum() <= least.sum() * 1.01


def test_flat_groups_and_outliers() -> None:
    """Zeros stay zeros, a constant is itself to fp16, and one large weight does not spoil the rest of its row."""
    weight = torch.randn(6, 192, generator=generator())
    weight[0] = 0
    weight[1] = -0.3
    weight[2, :64] = 0
    weight[3, 5] = 1000.0
    ours = group_storage(3, 64)((6, 192))
    ours.pack(weight)
    found = ours.unpack(torch.float32)
    assert not found[0].any() and not found[2, :64].any()
    torch.testing.assert_close(found[1], weight[1], rtol=2**-10, atol=0)
    assert (found[3, 64:] - weight[3, 64:]).abs().max() < 0.5
    assert abs(found[3, 5] - 1000) < 1
    for wrong in (torch.nan, torch.inf, 1e6):
        weight[4, 100] = wrong
        with pytest.raises(CheckpointError, match=r"int3_g64: a matrix of \(6, 192\) has weights that fp16 cannot"):
            ours.pack(weight)


def test_bytes_of_a_weight() -> None:
    """Codes and two statistics."""
    for bits, group in KINDS:
        assert group_storage(bits, group)((64, 1024)).nbytes == 64 * 1024 * (bits + 32 / group) / 8
    assert group_storage(2, 128)((3, 576)).nbytes == 3 * (144 + 4 * 5)  # the last group has 64
    assert group_storage(3, 64, ("points", "order"))((3, 100)).nbytes == 3 * (25 + 13 + 2 * 3) + 400


@pytest.mark.parametrize("also", VARIANTS)
def test_a_file_says_which_variant(also: tuple[str, ...]) -> None:
    """By the parts that it has."""
    stored = {name: HeldTensor(value) for name, value in parts(3, 64, 100, also).items()}
    tensor = PackedTensor.of(stored, group_storage(3, 64), (ROWS, 100), "w")
    assert tensor.storage is group_storage(3, 64, also)
    assert tensor.storage.used_for(group_storage(3, 64)) and group_storage(3, 64).used_for(tensor.storage)
    assert group_storage(3, 32).used_for(tensor.storage) is None
    torch.testing.assert_close(tensor.read().double(), exact(parts(3, 64, 100, also), 3, 64, 100))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zeros": None}, "w is packed, but its zeros is missing"),
        ({"high": None}, "w is packed, but its high is missing"),
        (
            {"points": torch.zeros(ROWS, 2, dtype=torch.uint8)},
            "w has zeros, which do not go with codes, high, scales",
        ),
        ({"groups": torch.zeros(100, dtype=torch.int32)}, "w has groups, which do not go with"),
        (
            {"scales": torch.zeros(ROWS, 2)},
            r"w has scales of type float32 and shape .*; expected F16 of \(12, 2\)",
        ),
        ({"codes": torch.zeros(ROWS, 24, dtype=torch.uint8)}, r"shape \(12, 24\); expected U8 of \(12, 25\)"),
        ({"order": torch.zeros(100, dtype=torch.int64)}, "order of type int64"),
        ({"order": torch.zeros(100, dtype=torch.int32)}, "w: its order is not one of its 100 columns"),
        ({"order": torch.arange(1, 101).int()}, "w: its order is not one of its 100 columns"),
    ],
)
def test_parts_that_do_not_fit(change: dict[str, Tensor | None], message: str) -> None:
    """Each is named, with what was expected."""
    stored = {name: HeldTensor(value) for name, value in (parts(3, 64, 100) | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        PackedTensor.of(stored, group_storage(3, 64), (ROWS, 100), "w").read()


@pytest.mark.parametrize("also", [(), ("order", "channel_scale"), ("points",)])
def test_memory_of_unpacking(also: tuple[str, ...]) -> None:
    """What plain PyTorch allocates beside the result is what the plan counts, for the whole and for some channels."""
    whole = matrix(3, 64, 1024, also, rows=700)
    state = {part: value.detach() for part, value in whole.named_parameters()}
    half = whole.of_range(1024, (1, 0, 512))((700, 512))
    half.adopt(whole.cut(state, 1024, "w", span=(1, 0, 512)))
    for weight in (whole, half):
        out = torch.empty(weight.shape)
        with AllocatedPeak() as peak:
            weight.unpack_into(out)
        assert weight.unpack_bytes(out.device) == pytest.approx(peak.bytes, rel=0.1)
