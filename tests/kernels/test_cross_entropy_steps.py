"""Ranks with slices of the vocabulary, played by threads, against log-softmax of whole rows in float64."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from accessory.kernels.cross_entropy_steps import in_two_steps
from accessory.kernels.plain import cross_entropy

ROWS, COLUMNS = 20, 12


def among(ranks: int) -> list[Callable[..., None]]:
    """A `Reduce` for each of so many threads."""
    barrier, given = Barrier(ranks), {}

    def reduce(rank: int, tensor: Tensor, operation: str = "sum") -> None:
        given[rank] = tensor.clone()
        barrier.wait()
        every = torch.stack([given[i] for i in range(ranks)])
        tensor.copy_(every.amax(0) if operation == "max" else every.sum(0))
        barrier.wait()

    return [lambda *given, rank=rank: reduce(rank, *given) for rank in range(ranks)]


def statistics(scores: Tensor, local: Tensor, width: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel's, which leaves the scores."""
    return cross_entropy.statistics(scores.clone(), local, width)


def become_gradient(scores: Tensor, local: Tensor, highest: Tensor, mass: Tensor, width: int | None) -> None:
    """A kernel's, by its formula."""
    scores.sub_(highest[:, None]).exp_().div_(mass[:, None])
    mine = (local >= 0) & (local < scores.shape[1])
    scores[mine, local[mine]] -= 1
    if width is not None:
        scores[:, width:] = 0


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("width", [None, COLUMNS - 5])
def test_equals_float64(ranks: int, width: int | None) -> None:
    """Losses, gradients and which labels are the likeliest; the last rank's columns from `width` on are padding."""
    generator = torch.Generator().manual_seed(0)
    whole = (10 * torch.randn(ROWS, ranks * COLUMNS, generator=generator)).double()
    real = whole if width is None else whole[:, : (ranks - 1) * COLUMNS + width]
    labels = torch.randint(0, real.shape[1], (ROWS,), generator=generator)
    labels[::2] = real.argmax(1)[::2]
    exact = real.clone().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    wanted.sum().backward()
    slices = [part.clone() for part in whole.split(COLUMNS, 1)]

    def of_rank(rank: int, reduce: Callable[..., None]) -> tuple[Tensor, Tensor]:
        likeliest = torch.empty(ROWS, dtype=torch.bool)
        own = width if rank == ranks - 1 else None
        given = slices[rank], labels - rank * COLUMNS, own, reduce if ranks > 1 else None
        return in_two_steps(statistics, become_gradient)(*given, likeliest=likeliest), likeliest

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(of_rank, range(ranks), among(ranks)))
    for losses, likeliest in found:
        torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-10, atol=1e-10)
        assert torch.equal(likeliest, real.argmax(1) == labels)
    gradient = torch.cat(slices, 1)
    torch.testing.assert_close(gradient[:, : real.shape[1]], exact.grad, rtol=1e-10, atol=1e-10)
    assert not gradient[:, real.shape[1] :].any()
