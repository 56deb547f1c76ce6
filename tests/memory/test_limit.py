"""--max_memory: what is refused, and with which flags it would fit."""

from __future__ import annotations

import re

import pytest

from accessory.errors import ConfigError
from accessory.memory.limit import check_limit
from accessory.memory.plan import StepMemory
from accessory.memory.recompute import available_memory, choose_layers
from accessory.parallel.groups import Layout
from tests.memory.small_models import LORA, SMALL, built
from tests.memory.test_recompute import CPU, plan_of

CHANGES = [{"optim": "adamw8bit"}, {"max_tokens": 100}, {"max_tokens": 100, "optim": "adamw8bit"}]


def refused(layout: Layout, limit: int, recomputed: int = 0) -> str | None:
    """The message for a step of 400 tokens; None: it may run."""
    decoder, attachment = built(SMALL, {**LORA, "lora_rank": 64})

    def step_with(max_tokens: int = 400, optim: str = "adamw") -> StepMemory:
        return StepMemory(decoder, attachment, layout, tokens=max_tokens, longest=100, data_parallel="sdp", optim=optim)

    try:
        check_limit(limit, recomputed, step_with, CHANGES)
    except ConfigError as error:
        said = str(error)
        if found := re.search(r"With (--.*) it would be", said):
            flags = dict(re.findall(r"--(\w+) (\w+)", found[1]))
            layers = int(flags.pop("checkpointing", recomputed))
            changed = {name: int(value) if value.isdigit() else value for name, value in flags.items()}
            assert step_with(**changed).plan(layers).total <= limit
        return said
    return None


def test_what_would_fit(layout: Layout) -> None:
    """The fewest layers that do, else the first change of flags that does; what it names does fit."""
    sizes = [plan_size(layout, layers) for layers in range(4)]
    assert refused(layout, sizes[0]) is None and refused(layout, sizes[2], 2) is None
    assert "With --checkpointing 1 it would be" in refused(layout, sizes[1])
    least = sizes.index(min(sizes))
    assert least > 1 and f"With --checkpointing {least} it would be" in refused(layout, sizes[least])
    assert "With --optim adamw8bit" in refused(layout, sizes[least] - 1)
    said = refused(layout, 1_000_000)
    assert said.startswith("--max_memory 0.00 GB: the plan of a step is 0.0") and said.endswith(" GB at the least.")


def plan_size(layout: Layout, layers: int) -> int:
    """Bytes of the step as it stands."""
    decoder, attachment = built(SMALL, {**LORA, "lora_rank": 64})
    return StepMemory(decoder, attachment, layout, tokens=400, longest=100, data_parallel="sdp").plan(layers).total


def test_auto_obeys_it(layout: Layout) -> None:
    """As many layers as it takes to get below the limit, if that is less than what is free."""
    free = available_memory(CPU)
    plans = {"n_layers": 6, "plan": lambda n: plan_of(int((0.5 - 0.05 * n) * free)), "layout": layout}
    assert choose_layers("auto", remedies="", limit=free // 2, **plans)[0] in (0, 1)
    found, why = choose_layers("auto", remedies="", limit=int(0.37 * free), **plans)
    assert found == 3 and re.search(r"spared, and into \d+\.\d GB$", why)
    with pytest.raises(ConfigError, match=r"and --max_memory allows \d+\.\d\d GB\. Try less,"):
        choose_layers("auto", remedies="less", limit=free // 10, **plans)
