"""Run under torchrun on two ranks, which split a model, then the data: each asserts, and says OK at the end."""

import sys
from pathlib import Path

import torch
from fairscale.nn.model_parallel import destroy_model_parallel
from torch import nn

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from accessory.errors import CheckpointError, DataError, ParallelError
from accessory.parallel import groups
from accessory.parallel.agree import check_alike, highest, on_main, together
from accessory.parallel.data import DataParallel, local, reduce_gradients, shard_like, sum_over_data_parallel, whole
from accessory.parallel.parameters import NamedParameters
from accessory.parallel.tensor import (
    WHOLE,
    Slicing,
    copy_to_model_parallel_region,
    gather_slices,
    reduce_from_model_parallel_region,
    slice_bounds,
)


def fails(words: str) -> None:
    """Say so."""
    raise DataError(words)


def check_together(rank: int) -> None:
    """One rank's error reaches all with its rank; everyone's error is said as it is; results pass through."""
    assert together(lambda one, two: rank + one * two, 3, two=4) == rank + 12
    assert on_main(lambda word: f"{word} of rank {rank}", word="said") == "said of rank 0"
    try:
        on_main(fails, "no room")
    except DataError as error:
        assert str(error) == "[rank 0] no room" and error.common
    else:
        raise AssertionError("the main rank's error did not reach this rank")

    def fails_on_one() -> None:
        if rank == 1:
            raise CheckpointError("shard 1 is gone")

    try:
        together(fails_on_one)
    except Exception as error:
        assert "[rank 1] shard 1 is gone" in str(error)
        assert error.common
    else:
        raise AssertionError("rank 1's error did not reach this rank")

    try:
        together(fails, "no data")
    except DataError as error:
        assert str(error) == "no data"


def check_alike_and_highest(rank: int) -> None:
    """What one rank knows all know; what differs is named with both values, and only that."""
    assert highest([rank, 5 - rank, 7]) == [1, 5, 7]
    check_alike({"seed": 0, "base": ["a"]})
    try:
        check_alike({"seed": rank, "lr": 0.1, **({"extra": 1} if rank else {})})
    except ParallelError as error:
        assert str(error).splitlines()[1:] == ["extra: None on rank 0, 1 on rank 1", "seed: 0 on rank 0, 1 on rank 1"]
        assert error.common
    else:
        raise AssertionError("the difference was not found")


def check_model_parallel(rank: int) -> None:
    """Column then row equals the plain product, forward and backward, in float64."""
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    up, down = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((8, 6), (6, 8)))
    expected = (x @ up.t()).tanh() @ down.t()
    expected.sum().backward()
    wanted = x.grad.clone(), up.grad.clone(), down.grad.clone()
    x.grad = None
    low, high = slice_bounds(8, rank, 2)
    my_up = up.detach()[low:high].clone().requires_grad_()
    my_down = down.detach()[:, low:high].clone().requires_grad_()
    y = reduce_from_model_parallel_region((copy_to_model_parallel_region(x) @ my_up.t()).tanh() @ my_down.t())
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, wanted[0])
    torch.testing.assert_close(gather_slices(my_up.grad, 0), wanted[1])
    torch.testing.assert_close(gather_slices(my_down.grad, 1), wanted[2])
    check_gradient_norm(rank)


def check_gradient_norm(rank: int) -> None:
    """Sliced values count once each, copied ones once in all, partial gradients are completed first."""
    sliced, copied, partial = (nn.Parameter(torch.zeros(4)) for _ in range(3))
    sliced.grad = torch.full((4,), float(rank + 1))
    copied.grad = torch.full((4,), 3.0)
    partial.grad = torch.full((4,), float(10**rank))
    parameters = {"sliced": sliced, "copied": copied, "partial": partial}
    slicings = {"sliced": Slicing(dim=0), "copied": WHOLE, "partial": Slicing(partial=True)}
    named = NamedParameters(parameters, slicings)
    named.sum_partial_gradients()
    assert partial.grad.tolist() == [11.0] * 4
    expected = (4 * (1 + 4) + 4 * 9 + 4 * 121) ** 0.5
    torch.testing.assert_close(named.gradient_norm(), torch.tensor(expected))
    named.scale_gradients(0.5)
    torch.testing.assert_close(named.gradient_norm(), torch.tensor(expected / 2))


def check_data_parallel(layout: groups.Layout) -> None:
    """Gradients are summed, not averaged; odd sizes survive sharding; `shard_like` undoes `whole`."""
    for mode in ("sdp", "fsdp"):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        frozen = nn.Parameter(torch.arange(7, dtype=torch.uint8), requires_grad=False)
        model.packed = frozen
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        data_parallel = DataParallel(layout, mode, base_is_trained=False)
        data_parallel.shard_root(model)
        sharded = dict(model.named_parameters())
        assert local(sharded["packed"]).numel() == (7 if mode == "sdp" else 4 - layout.rank)
        for name, value in before.items():
            assert torch.equal(whole(sharded[name].detach()), value), name
            rebuilt = shard_like(value, sharded[name])
            assert torch.equal(local(rebuilt), local(sharded[name].detach())), name
        x = torch.full((2, 5), float(layout.rank + 1))
        reduce_gradients(model, last=True)
        model(x).sum().backward()
        assert torch.equal(whole(model.weight.grad), torch.full((3, 5), 6.0))
        norm = NamedParameters(sharded, dict.fromkeys(before, WHOLE)).gradient_norm()
        torch.testing.assert_close(norm, torch.tensor((15 * 36 + 3 * 16.0) ** 0.5))
    assert sum_over_data_parallel(torch.tensor(layout.rank + 1.0)).item() == 3.0


layout = groups.start("cpu", model_parallel_size=2)
assert (layout.mp_rank, layout.mp_size, layout.dp_rank, layout.dp_size) == (layout.rank, 2, 0, 1)
check_together(layout.rank)
check_alike_and_highest(layout.rank)
check_model_parallel(layout.rank)
destroy_model_parallel()
layout = groups.start("cpu", model_parallel_size=1)
assert (layout.mp_rank, layout.mp_size, layout.dp_rank, layout.dp_size) == (0, 1, layout.rank, 2)
check_data_parallel(layout)
print(f"OK {layout.rank}", flush=True)
groups.end_process()
