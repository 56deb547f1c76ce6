"""The kernels of decoding in few launches against the same work step by step."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from accessory.kernels.codes import Codes, GroupCodes
from accessory.kernels.decoding import Attending, Products
from accessory.kernels.plain import decoding_attention as attention_written_out
from accessory.kernels.plain import decoding_groups as groups_written_out
from accessory.kernels.plain import decoding_products as products_written_out
from accessory.kernels.triton import decoding_attention, decoding_groups, decoding_products
from accessory.quant.groups import packed_codes

COLUMNS = 704  # eleven blocks of 64: the last ones that a program reads together are not all there
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
LEVELS = bnb.create_dynamic_map()  # of nested scales: one for all matrices
Randn = Callable[..., Tensor]


@pytest.fixture
def randn() -> Randn:
    """Normal numbers."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


def codes(randn: Randn, n: int, *, nested: bool = True, quant_type: str | torch.dtype = "nf4") -> Codes | Tensor:
    """A random matrix [n, COLUMNS]; plain, if a dtype is given."""
    if isinstance(quant_type, torch.dtype):
        return (randn(n, COLUMNS) * 0.05).to(quant_type)
    packed, state = bnb.quantize_4bit(
        randn(n, COLUMNS) * 0.05, blocksize=64, compress_statistics=nested, quant_type=quant_type
    )
    more = (LEVELS, state.state2.absmax, state.offset.view(1)) if nested else None
    return Codes((n, COLUMNS), packed.flatten(), state.code, state.absmax, more, quant_type)


def launches(randn: Randn, dtype: torch.dtype, **how) -> dict[str, tuple[Products, int, int, bool]]:
    """(products, parts of low products, rank, whether there is a residual) of every link of a block, and a bare one."""

    def lora(n: int, rank: int = 16) -> Tensor:
        """B."""
        return (randn(n, rank) * 0.1).to(dtype)

    norm, made = randn(COLUMNS).abs(), {}
    three, pair = (codes(randn, 48, **how), codes(randn, 16, **how), codes(randn, 20, **how)), [codes(randn, 72, **how)]
    pair.append(codes(randn, 72, **how))
    made["entrance"] = Products(three, norm, 1e-5, lora(84), randn(84)), 70, 64, False
    made["out"] = Products((pair[0],), None, 0.0, lora(72, 32), None, None, randn(32, 72).to(dtype)), 3, 32, True
    made["gated"] = (
        Products(tuple(pair), norm, 1e-5, lora(144), randn(144), "gelu_tanh", randn(16, 72).to(dtype)),
        9,
        32,
        False,
    )
    wide = torch.stack([norm, randn(COLUMNS)])
    made["layer norm"] = made["entrance"][0]._replace(norm=wide, corrections=randn(2, 48)), 70, 64, False
    made["layer norm, one"] = (
        Products((pair[0],), wide, 1e-5, lora(72), randn(72), "relu", randn(16, 72).to(dtype), 48, randn(2, 16)),
        70,
        64,
        False,
    )
    made["bare"] = Products((pair[1],)), 0, 0, False
    return made


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
def test_products(randn: Randn, rows: int, dtype: torch.dtype, plain: bool) -> None:
    """Results, and what follows needs."""
    how = {"quant_type": dtype} if plain else {}
    for name, (products, parts, rank, more) in launches(randn, dtype, **how).items():
        x, lows = (randn(rows, COLUMNS) + 3).to(dtype), randn(rows, parts, rank) if parts else None
        residual = randn(rows, products.made).to(dtype) if more else None
        found, low = decoding_products.multiply(products, x, lows, residual)
        wanted, wanted_low = products_written_out.multiply(products, x, lows, residual)
        assert found.dtype == dtype and (found - wanted).float().norm() <= ROUNDING[dtype] * wanted.float().norm(), name
        assert (low is None) == (wanted_low is None) == (products.following is None)
        if low is not None:
            difference = (low.sum(1) - wanted_low.sum(1)).norm()
            assert difference <= ROUNDING[dtype] * wanted_low.norm() and low.shape[1] == 3, name


@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
def test_what_is_too_large_for_fp16_before_it_is_normalized(randn: Randn, plain: bool) -> None:
    """x times the norm's weight, and x A^T: up to 400,000, where fp16 ends at 65,504."""
    dtype = torch.float16
    products, parts, rank, _ = launches(randn, dtype, **{"quant_type": dtype} if plain else {})["entrance"]
    products = products._replace(norm=products.norm * 40)
    for rows in (1, 5):
        x, lows = (randn(rows, COLUMNS) * 3000).to(dtype), randn(rows, parts, rank) * 30000
        found, _ = decoding_products.multiply(products, x, lows)
        wanted, _ = products_written_out.multiply(products, x, lows)
        assert (x.float() * products.norm).abs().max() > lows.sum(1).abs().max() > 65504 and wanted.isfinite().all()
        assert (found - wanted).float().norm() <= ROUNDING[dtype] * wanted.float().norm()


def test_a_row_does_not_depend_on_the_others(randn: Randn) -> None:
    """Among several. (Alone it is computed in another order.)"""
    products, parts, rank, _ = launches(randn, torch.float32)["entrance"]
    x, lows = randn(4, COLUMNS), randn(4, parts, rank)
    all_, _ = decoding_products.multiply(products, x, lows)
    some, _ = decoding_products.multiply(products, x[1:3].contiguous(), lows[1:3].contiguous())
    assert torch.equal(all_[1:3], some)


@pytest.mark.parametrize("how", [{"nested": False}, {"quant_type": "fp4"}])
def test_other_storages(randn: Randn, how: dict) -> None:
    """Plain scales; another codebook."""
    products, x = Products((codes(randn, 40, **how),)), randn(1, COLUMNS)
    found, _ = decoding_products.multiply(products, x)
    torch.testing.assert_close(found, products_written_out.multiply(products, x)[0], rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(randn: Randn) -> None:
    """Before anything is read."""
    one = codes(randn, 40)
    cases = {
        "1 to 16": (Products((one,)), randn(17, COLUMNS), None),
        "x is": (Products((one,)), randn(1, 640), None),
        "LoRA needs": (Products((one,), b=randn(40, 16)), randn(1, COLUMNS), None),
        "lows are": (Products((one,), b=randn(40, 16)), randn(1, COLUMNS), randn(1, 2, 15)),
        "of rank 8": (Products((one,), b=randn(40, 8)), randn(1, COLUMNS), randn(1, 2, 8)),
        "bias is": (Products((one,), bias=randn(41)), randn(1, COLUMNS), None),
        "a plain matrix beside": (Products((one, randn(40, COLUMNS))), randn(1, COLUMNS), None),
        "a matrix beside plain": (Products((randn(40, COLUMNS), one)), randn(1, COLUMNS), None),
        "expected contiguous ones in torch.float32": (
            Products((randn(40, COLUMNS).half(),)),
            randn(1, COLUMNS),
            None,
        ),
    }
    for message, given in cases.items():
        with pytest.raises(AssertionError, match=message):
            decoding_products.multiply(*given)


def grouped(randn: Randn, n: int, bits: int, group: int, *, points: bool = False) -> GroupCodes:
    """A random matrix [n, COLUMNS]; a group's last may be shorter."""
    numbers = torch.randint(0, 1 << bits, (n, COLUMNS), generator=torch.Generator().manual_seed(n)).to(torch.uint8)
    statistics, kind = (n, -(-COLUMNS // group)), {"zeros": None, "points": None}
    if points:
        kind["points"] = torch.randint(0, 1 << bits, statistics, generator=torch.Generator().manual_seed(1)).to(
            torch.uint8
        )
    else:
        kind["zeros"] = randn(*statistics).half()
    parts = packed_codes(numbers, bits)
    return GroupCodes(
        (n, COLUMNS), bits, group, parts["codes"], parts.get("high"), randn(*statistics).abs().half(), **kind
    )


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_groups(randn: Randn, rows: int, dtype: torch.dtype) -> None:
    """Of every width, with LoRA and biases, and alone."""
    three = [grouped(randn, 40, 4, 128), grouped(randn, 9, 3, 32, points=True), grouped(randn, 20, 2, 64)]
    x = randn(rows, COLUMNS).to(dtype)
    added = randn(rows, 48), randn(69, 16).to(dtype), randn(69)
    for matrices, more in ((three, added), (three[1:2], ())):
        found = decoding_groups.multiply(matrices, x, *more)
        wanted = groups_written_out.multiply(matrices, x, *more)
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == dtype and (one - other).float().norm() <= ROUNDING[dtype] * other.float().norm()


def test_other_groups_are_left(randn: Randn) -> None:
    """Of few columns, or in another order."""
    one = grouped(randn, 40, 4, 128)
    assert decoding_groups.takes(one)
    assert not decoding_groups.takes(one._replace(group=4))
    assert not decoding_groups.takes(one._replace(order=torch.arange(COLUMNS, dtype=torch.int32)))
    assert not decoding_groups.takes(one._replace(shape=(40, COLUMNS - 2)))
    with pytest.raises(AssertionError, match="LoRA needs"):
        decoding_groups.multiply([one], randn(1, COLUMNS), randn(1, 16))


CASES = [
    (4, 4, 16, 8, "pairs", None, torch.float32, 150),
    (4, 2, 32, 8, "halves", 37, torch.float32, 100),
    (6, 2, 16, 8, "halves", None, torch.bfloat16, 130),
    (2, 2, 16, 4, "pairs", 3, torch.float16, 64),
    (3, 1, 16, 8, "pairs", 1, torch.float32, 31),
    (4, 4, 16, 0, "halves", None, torch.float32, 90),
    (4, 2, 32, 0, "halves", None, torch.bfloat16, 90),
]
NORMED = CASES[:3]
"""Cases that are tried with norms of queries and keys, too."""


@pytest.mark.parametrize(("heads", "kv_heads", "width", "half", "layout", "window", "dtype", "span"), CASES)
@pytest.mark.parametrize("programs", [1, 64])
def test_attention(
    randn: Randn, monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, width: int, half: int, layout: str,
    window: int | None, dtype: torch.dtype, span: int, programs: int,
) -> None:  # fmt: skip
    """Results, low products, and the cache; a cache of one program, and one that several share, twice.

    Without rotations with ALiBi's slopes, whose channels are in the cache.
    """
    monkeypatch.setattr(decoding_attention, "processors", lambda device: programs)
    monkeypatch.setattr(decoding_attention, "LEAST", 32)
    monkeypatch.setattr(decoding_attention, "TOKENS", 16)
    angles = randn(200, half)
    following = randn(16, heads * width).to(dtype)
    rotations = torch.polar(torch.ones_like(angles), angles)
    how = Attending(heads, kv_heads, width, rotations, layout, width**-0.5, window, following)
    if (heads, kv_heads, width) in {case[:3] for case in NORMED}:
        how = how._replace(norms=(randn(width), randn(width)), eps=1e-3)
    more = 0 if half else 8
    if more:
        how = how._replace(slopes=torch.rand(heads), beyond=randn(200, more).to(dtype))
    positions, projected = torch.tensor([span - 1, 0, 20]), randn(3, (heads + 2 * kv_heads) * width).to(dtype)
    caches = [randn(4, 180, kv_heads, width + more).to(dtype) for _ in range(2)]
    copies = [cache.clone() for cache in caches]
    scratch = decoding_attention.Scratch(how, 3, 180, projected.device)
    for _ in range(2):
        found, low = decoding_attention.attend(how, projected, *caches, positions, span, scratch)
    wanted, wanted_low = attention_written_out.attend(how, projected, *copies, positions, span, None)
    assert (found - wanted).float().norm() <= ROUNDING[dtype] * wanted.float().norm()
    assert (low.sum(1) - wanted_low.sum(1)).norm() <= ROUNDING[dtype] * wanted_low.norm()
    for cache, copy in zip(caches, copies, strict=True):
        assert (cache.float() - copy.float()).abs().max() <= ROUNDING[dtype]
        assert torch.equal(cache[3], copy[3])
    assert (decoding_attention.splits_of(span, 3 * kv_heads, projected.device) > 1) == (programs > 1 and span >= 64)
