"""Agreement between ranks: if work fails on one rank, all ranks raise the same error before any goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from accessory.errors import AccessoryError, ParallelError

Given = ParamSpec("Given")
Result = TypeVar("Result")


def together(work: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
    """Run `work` on every rank; if it raises an `AccessoryError` on any, all ranks raise the first such rank's.

    `work` must contain no collective: a rank that failed inside it would leave the others waiting. The raised error is
    `common`, so that the entry prints it once.
    """
    result: Result | None = None
    fault: AccessoryError | None = None
    try:
        result = work(*args, **kwargs)
    except AccessoryError as error:
        fault = error
    if dist.is_initialized() and dist.get_world_size() > 1:
        faults: list[tuple[type[AccessoryError], str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(faults, (type(fault), str(fault)) if fault else None)
        failed = [rank for rank, found in enumerate(faults) if found is not None]
        if failed:
            kind, message = faults[failed[0]]
            where = "" if len(failed) == len(faults) else f"[rank {failed[0]}] "
            fault = kind(where + message)
    if fault:
        fault.common = True
        raise fault
    return result


def on_main(work: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
    """Run `work` on the main rank only; every rank returns its result or raises its error. A collective."""
    found = [together(work, *args, **kwargs) if dist.get_rank() == 0 else together(lambda: None)]
    dist.broadcast_object_list(found)
    return found[0]


def highest(values: list[int]) -> list[int]:
    """The maximum of each value over all ranks. A collective on the host, which waits for no GPU."""
    if dist.get_world_size() == 1:
        return values
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def differences(name: str, one: Any, other: Any) -> list[tuple[str, Any, Any]]:
    """(path, value in `one`, value in `other`) for each difference of two pieces of JSON; absent values are None."""
    if isinstance(one, dict) and isinstance(other, dict):
        inner = [(f"{name}.{key}", one.get(key), other.get(key)) for key in dict.fromkeys([*other, *one])]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        inner = [(f"{name}[{place}]", *values) for place, values in enumerate(zip(one, other, strict=True))]
    else:
        return [] if one == other else [(name, one, other)]
    return [found for values in inner for found in differences(*values)]


def check_alike(facts: dict[str, object]) -> None:
    """Check that JSON-like `facts` are equal on all ranks, so that all train on the same thing. A collective.

    Raises `ParallelError` on every rank, naming each fact that differs, with rank 0's value and another rank's.
    """
    everyone: list[dict[str, object]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, facts)
    faults = []
    for key in sorted(set().union(*everyone)):
        rank = next((r for r, found in enumerate(everyone) if found.get(key) != everyone[0].get(key)), None)
        if rank is not None:
            faults += [
                f"{name}: {first!r} on rank 0, {theirs!r} on rank {rank}"
                for name, first, theirs in differences(key, everyone[0].get(key), everyone[rank].get(key))
            ]
    if faults:
        raise ParallelError("The processes were not started alike:\n" + "\n".join(faults), common=True)
