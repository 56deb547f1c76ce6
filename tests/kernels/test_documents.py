"""Documents packed in one tensor: where their tokens are, against lists of them."""

from __future__ import annotations

import random
from itertools import chain, pairwise

import pytest
import torch

from accessory.kernels.documents import Documents, SharedPrefixes

CPU = torch.device("cpu")


def random_tree(seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of up to nine documents, and with how much of the one before each begins."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, 12) for _ in range(draw.randint(2, 9))]
    shared = [draw.randint(0, min(pair)) for pair in pairwise(lengths)]
    return tuple(lengths), (0, *shared)


def documents(lengths: tuple[int, ...], shared: tuple[int, ...]) -> list[list[int]]:
    """Their packed tokens, by number."""
    found, new = [[]], 0
    for length, known in zip(lengths, shared, strict=True):
        found.append(found[-1][:known] + list(range(new, new + length - known)))
        new += length - known
    return found[1:]


@pytest.mark.parametrize("seed", range(20))
def test_places_are_those_of_the_documents(seed: int) -> None:
    """Laid out, each document is whole; packed again, nothing has changed; what has several places is found in each."""
    lengths, shared = random_tree(seed)
    whole = list(chain.from_iterable(documents(lengths, shared)))
    prefixes = SharedPrefixes.build(lengths, shared, CPU)
    if not any(shared):
        assert prefixes is None
        return
    packed = torch.randn(sum(lengths) - sum(shared), 2, 3)
    assert torch.equal(prefixes.lay_out(packed), packed[whole])
    assert torch.equal(prefixes.pack(packed[whole]), packed)
    places = {
        row: tuple(place)
        for rows, copies in prefixes.repeated
        for row, place in zip(rows.tolist(), copies.view(len(rows), -1).tolist(), strict=True)
    }
    wanted = {row: tuple(i for i, other in enumerate(whole) if other == row) for row in set(whole)}
    assert places == {row: place for row, place in wanted.items() if len(place) > 1}


def test_gradients_are_those_of_indexing() -> None:
    """By finite differences, and by autograd through plain indexing."""
    lengths, shared = (7, 9, 6, 8, 5), (0, 4, 6, 2, 2)
    prefixes = SharedPrefixes.build(lengths, shared, CPU)
    packed = torch.randn(21, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: prefixes.pack(prefixes.lay_out(x).square() + 1).sin(), packed)
    weights = torch.randn(35, 2, dtype=torch.float64)
    (found,) = torch.autograd.grad((prefixes.lay_out(packed) * weights).sum(), packed)
    whole = list(chain.from_iterable(documents(lengths, shared)))
    (wanted,) = torch.autograd.grad((packed[whole] * weights).sum(), packed)
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)


def test_gradients_of_copies_are_rounded_once() -> None:
    """Of 200 copies in bf16: as near as a bf16 number comes to their sum."""
    prefixes = SharedPrefixes.build((3,) * 200, (0, *(2,) * 199), CPU)
    packed = torch.randn(202, 8).bfloat16().requires_grad_()
    given = torch.randn(600, 8).bfloat16()
    prefixes.lay_out(packed).backward(given)
    wanted = given.double().view(200, 3, 8)[:, :2].sum(0)
    assert torch.equal(packed.grad[:2], wanted.bfloat16())


@pytest.mark.parametrize("seed", range(5))
def test_sizes_and_rows_for_kernels(seed: int) -> None:
    """Against the documents written out; each row of the table leads to the document's own keys and packed queries."""
    lengths, shared = random_tree(seed)
    found, whole = Documents.build(lengths, shared), documents(lengths, shared)
    keys = list(chain.from_iterable(whole))
    assert (found.keys, found.rows, found.longest) == (len(keys), len(set(keys)), max(map(len, whole)))
    ends = found.offsets.tolist()
    assert found.offsets.dtype == torch.int32 and [keys[a:b] for a, b in pairwise(ends)] == whole
    rows = found.table.tolist()
    assert [row[1] for row in rows] == sorted(lengths, reverse=True)
    told = [(keys[at : at + length], list(range(query + known, query + length))) for at, length, known, query in rows]
    assert sorted(told) == sorted((document, document[known:]) for document, known in zip(whole, shared, strict=True))


def test_no_documents() -> None:
    """A rank without any."""
    found = Documents.build(())
    assert (found.keys, found.rows, found.longest, found.prefixes) == (0, 0, 0, None)
    assert found.offsets.tolist() == [0] and found.table.shape == (0, 4)
