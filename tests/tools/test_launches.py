"""The counter of launches, on a CPU whose operations are counted as a GPU's; docs/speed.md's tables are its figures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tools.benchmarking.launches import Counts, LaunchCounter, multi_tensor_launches
from tools.benchmarking.pretended_gpu import load


@pytest.fixture
def counter() -> LaunchCounter:
    """One that counts the CPU's operations."""
    return LaunchCounter("cpu")


def test_views_and_allocations_count_nothing(counter: LaunchCounter) -> None:
    x = torch.zeros(4, 6)
    with counter:
        torch.empty(3), x.t()[1:].unflatten(0, (5, 1)), x.expand(2, 4, 6), x.detach(), torch.empty_like(x)
    assert not counter.found


def test_bytes_are_read_and_written(counter: LaunchCounter) -> None:
    """A product reads two matrices and writes one; in place a tensor is read and written; expanded rows lie once."""
    a, b, row, table = torch.zeros(4, 6), torch.zeros(6, 8), torch.zeros(8), torch.zeros(100, 8)
    wanted = {
        "mm": 4 * (24 + 48 + 32), "add_": 4 * 2 * 32, "zero_": 4 * 48, "add": 4 * (8 + 32),
        "index_select": 4 * 2 * 8 + 8, "_to_copy": 12 * 8,
    }  # fmt: skip
    with counter:
        a @ b, row.expand(4, 8) + 1, table.index_select(0, torch.tensor([3])), row.double()
        torch.empty(4, 8).add_(1.0), torch.empty_like(b).zero_()
    for name, moved in wanted.items():
        assert counter.found["rest", name] == Counts(1, moved), name


def test_copy_that_addmm_makes_first(counter: LaunchCounter) -> None:
    """A bias is added inside the product; a matrix is copied into the result before, and read there again."""
    y, a, b, bias = torch.zeros(4, 8), torch.zeros(4, 6), torch.zeros(6, 8), torch.zeros(8)
    with counter:
        torch.addmm(bias, a, b)
        fused = counter.total()
        torch.addmm(y, a, b)
    assert fused == Counts(1, 4 * (8 + 24 + 48 + 32))
    assert counter.total() - fused == Counts(2, 4 * (32 + 24 + 48 + 32 + 2 * 32))


def test_what_the_host_waits_for(counter: LaunchCounter) -> None:
    x = torch.ones(3)
    with counter:
        x.sum().item(), x.tolist(), (x > 0).nonzero(), x[x > 0]
    syncs = {operation: counts.syncs for (_, operation), counts in counter.found.items() if counts.syncs}
    assert syncs["item"] == 1 and syncs["nonzero"] == 1 and syncs["index"] == 1
    assert counter.total().syncs == 3, "a CPU's tolist reads memory; a GPU's is a copy, which is counted"


def test_phases(counter: LaunchCounter) -> None:
    model = nn.Linear(3, 2, bias=False)
    with counter, counter.watch(model):
        loss = model(torch.zeros(4, 3)).sum()
        loss.backward()
    assert [key for key in counter.found if key[1] == "mm"] == [("forward", "mm"), ("backward", "mm")]
    assert ("rest", "sum") in counter.found


@pytest.mark.parametrize(
    ("sizes", "lists", "launches"),
    [
        ([5] * 110, 1, 1),
        ([5] * 111, 1, 2),
        ([5] * 36, 4, 1),
        ([5] * 37, 4, 2),
        ([65536 * 320], 1, 1),
        ([65536 * 320 + 1], 1, 2),
        ([0, 0], 2, 0),
    ],
)
def test_multi_tensor_launches(sizes: list[int], lists: int, launches: int) -> None:
    """110 tensors a list, 36 of four lists, 320 blocks of 65,536 numbers."""
    assert multi_tensor_launches(sizes, lists) == launches


def test_one_launch_for_many_parameters(counter: LaunchCounter) -> None:
    parameters = [nn.Parameter(torch.zeros(7)) for _ in range(30)]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones(7)
    optimizer.step()
    with counter:
        optimizer.step()
    # Parameter, gradient and two moments; the gradient is only read. Their steps are read by each.
    assert counter.found["rest", "_fused_adamw_"] == Counts(1, 30 * (7 * 4 * 7 + 4))


def test_a_pretended_gpu_comes_before_torch() -> None:
    with pytest.raises(RuntimeError, match="before torch"):
        load()
