"""A limit on a device's memory, and what would fit where a step's plan exceeds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accessory.errors import ConfigError
from accessory.memory.plan import MemoryPlan, StepMemory


def check_limit(
    limit: int, recomputed: int, step_with: Callable[..., StepMemory], changes: list[dict[str, Any]]
) -> None:
    """Raise `ConfigError` where a step that recomputes so many layers takes more than `limit` bytes on this device.

    step_with: the step's memory with some flags changed. changes: flags that could be, and their values, tried one
    after the other, each with as few layers recomputed as then fit. The error says what would fit.
    """
    step = step_with()
    total = step.plan(recomputed).total
    if total <= limit:
        return
    said = f"--max_memory {_gb(limit)}: the plan of a step is {_gb(total)} on a device."
    least = total
    for changed in [{}, *changes]:
        step = step_with(**changed)
        plans = [step.plan(layers) for layers in range(len(step.blocks) + 1)]
        flags = [f"--{name} {value}" for name, value in changed.items()]
        if (layers := _fewest(plans, limit)) is not None:
            flags += [f"--checkpointing {layers}"] if layers != recomputed else []
            raise ConfigError(f"{said} With {' '.join(flags)} it would be {_gb(plans[layers].total)}.")
        least = min(least, *(plan.total for plan in plans))
    raise ConfigError(f"{said} With other flags it would be {_gb(least)} at the least.")


def _fewest(plans: list[MemoryPlan], limit: int) -> int | None:
    return next((layers for layers, plan in enumerate(plans) if plan.total <= limit), None)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
