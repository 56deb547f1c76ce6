"""LoRA's factors as products read them. On a GPU, all of a model's factors are cast and joined once a step.

Casting them one by one would take as many launches as a block's products. A CPU's kernels read fp32 factors, which are
joined at each use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from accessory.kernels.addition import Addition


class Factors(NamedTuple):
    """Factors of linears that share an input. a [sum of R, K]: the A of those without dropout, stacked, or None.
    b: each B [N, R], or None.
    """

    a: Tensor | None
    b: list[Tensor | None]


_made: dict[tuple, tuple[Factors, list[Addition]]] = {}  # the additions are held, because their addresses are the keys


@contextmanager
def constant_factors(groups: Iterable[list[Addition]], dtype: torch.dtype) -> Iterator[None]:
    """Inside this context the factors of `groups` do not change, so their casts to `dtype` are kept.

    groups: additions to linears that share an input; those on a CPU are left out. It holds for all threads,
    because a GPU's backward runs in a thread of PyTorch's.
    """
    groups = [additions for additions in groups if _on_gpu(additions)]
    try:
        for additions, factors in zip(groups, _cast(groups, dtype), strict=True):
            _made[_key(additions, dtype)] = factors, additions
        yield
    finally:
        _made.clear()


def factors_of(additions: list[Addition], dtype: torch.dtype) -> Factors:
    """The factors for products in `dtype`; on a CPU they keep their own dtype."""
    if _on_gpu(additions):
        kept = _made.get(_key(additions, dtype))
        return kept[0] if kept else _cast([additions], dtype)[0]
    joined = [additions[i].a for i in without_dropout(additions)]
    return Factors(torch.cat(joined) if joined else None, [addition.b for addition in additions])


def without_dropout(additions: list[Addition]) -> list[int]:
    """Indices of the additions whose A are joined: those that read x without dropout."""
    return [i for i, addition in enumerate(additions) if addition.a is not None and not addition.dropout]


def factor_bytes(numbers: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that a step keeps for casts of factors of `numbers` numbers in all: for the memory plan."""
    return numbers * dtype.itemsize if device.type == "cuda" else 0


def _on_gpu(additions: list[Addition]) -> bool:
    return any(addition.b is not None and addition.b.is_cuda for addition in additions)


def _key(additions: list[Addition], dtype: torch.dtype) -> tuple:
    return dtype, *((id(addition.a), id(addition.b), bool(addition.dropout)) for addition in additions)


def _cast(groups: list[list[Addition]], dtype: torch.dtype) -> list[Factors]:
    """Cast all groups in a few launches."""
    found, places, sources = [], [], []
    for additions in groups:
        joined = [additions[i].a for i in without_dropout(additions)]
        a = joined[0].new_empty(sum(map(len, joined)), joined[0].shape[1], dtype=dtype) if joined else None
        b = [None if addition.b is None else torch.empty_like(addition.b, dtype=dtype) for addition in additions]
        places += [] if a is None else a.split(list(map(len, joined)))
        places += [factor for factor in b if factor is not None]
        sources += [*joined, *(addition.b for addition in additions if addition.b is not None)]
        found.append(Factors(a, b))
    if places:
        with torch.no_grad():
            torch._foreach_copy_(places, sources)
    return found
