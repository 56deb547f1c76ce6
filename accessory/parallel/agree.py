"""One rank alone must never decide: work that may fail on some ranks is agreed upon before anyone goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from accessory.errors import AccessoryError

Result = TypeVar("Result")


def together(work: Callable[[], Result]) -> Result:
    """Run `work` on every rank; if it raised an `AccessoryError` on any, raise the first such rank's on all.

    `work` must hold no collective, or the ranks that failed inside would leave the others waiting. The raised error
    carries `common = True`, so that the entry prints it once.
    """
    result: Result | None = None
    fault: AccessoryError | None = None
    try:
        result = work()
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
