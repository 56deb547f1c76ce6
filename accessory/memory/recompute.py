"""Activation checkpointing: how many blocks are recomputed in the backward, as asked for or as few as fit."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from accessory.errors import ConfigError
from accessory.memory.plan import MemoryPlan
from accessory.model.decoder import Decoder
from accessory.model.offload import InputOffload
from accessory.parallel.agree import highest, together
from accessory.parallel.groups import Layout

MARGIN = 0.1
"""Share of the free memory that is reserved for what the plan does not count: communication, fragmentation."""
_CGROUPS = Path("/sys/fs/cgroup")


def choose_layers(
    asked: int | str,
    n_layers: int,
    plan: Callable[[int], MemoryPlan],
    layout: Layout,
    remedies: str,
    limit: int | None = None,
) -> tuple[int, str]:
    """(layers to recompute, what to tell the user) for a value of `--checkpointing`, equal on all ranks.

    plan: number of recomputed layers -> a step's memory. remedies: flags that make a step smaller. limit: bytes that
    `auto` may plan for at most. A collective.
    Raises `ConfigError` for more layers than there are, and for `auto` where not even all would be enough.
    """
    number = {"none": 0, "all": n_layers}.get(asked, asked)
    if number != "auto":
        if number > n_layers:
            raise ConfigError(f"--checkpointing {number}: the model has {n_layers} layers.", common=True)
        return number, ""
    free = _share_of_free_memory(layout)
    chosen = together(_fewest_that_fit, n_layers, plan, free, remedies, limit)
    # The rank with the least memory decides: model-parallel ranks must recompute the same blocks together.
    (most,) = highest([chosen])
    allowed = f", and into {limit / 1e9:.1f} GB" if limit else ""
    return most, f"fewest that fit into the {free / 1e9:.1f} GB free, {MARGIN:.0%} of them spared{allowed}"


def _fewest_that_fit(
    n_layers: int, plan: Callable[[int], MemoryPlan], free: int, remedies: str, limit: int | None
) -> int:
    room = min(int(free * (1 - MARGIN)), limit or free)
    allowed = f", and --max_memory allows {limit / 1e9:.2f} GB" if limit else ""
    totals = [plan(layers).total for layers in range(n_layers + 1)]
    for layers, total in enumerate(totals):
        if total <= room:
            return layers
    raise ConfigError(
        f"--checkpointing auto: a step takes {min(totals) / 1e9:.2f} GB even with the layers recomputed; "
        f"{free / 1e9:.2f} GB are free, of which {MARGIN:.0%} are spared{allowed}. Try {remedies}, or "
        "--checkpointing all to go on all the same."
    )


def recompute_layers(decoder: Decoder, layers: int, *, offload: bool, device: torch.device) -> None:
    """Recompute the first `layers` blocks in the backward; with `offload` their inputs are moved to host memory.

    The first ones, because the backward reaches them last: what later blocks kept is freed by then, and makes room for
    a recomputed block's activations. Those of the last block would be added to all that is kept, so recomputing it
    saves nothing. The first inputs are also unused for the longest time, which is when they are moved.
    """
    inputs = InputOffload(device) if offload else None
    for _, block in islice(decoder.blocks(), layers):
        block.recompute, block.offload = True, inputs


def check_offload(asked: bool, device: torch.device) -> None:
    """Raises `ConfigError` where `--offload_inputs` would move inputs from host memory to host memory."""
    if asked and device.type != "cuda":
        raise ConfigError(
            f"--offload_inputs on --device {device.type}: inputs are in host memory already, and a copy of them frees "
            "nothing. Leave it out, or use --device cuda."
        )


def _share_of_free_memory(layout: Layout) -> int:
    """The free memory that this rank may use; ranks on one machine divide the CPU's. A collective."""
    hosts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    sharers = hosts.count(socket.gethostname()) if layout.device.type == "cpu" else 1
    return available_memory(layout.device) // sharers


def available_memory(device: torch.device) -> int:
    """Free bytes of the GPU, or of this machine within the limits of its cgroups."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min([free, *cgroup_room(Path("/proc/self/cgroup"), _CGROUPS)])


def cgroup_room(membership: Path, root: Path) -> Iterator[int]:
    """Bytes left in this process's cgroup (version 2 or 1) and in each of its parents.

    membership: /proc/self/cgroup. root: where the groups are mounted. Groups without a limit are skipped.
    """
    if not membership.is_file():
        return
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = root / "memory"
        else:
            continue
        group = top / path.strip("/")
        while group.is_relative_to(top):
            yield from _room_of(group, *names)
            group = group.parent


def _room_of(group: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    try:
        most, used = ((group / name).read_text().strip() for name in (limit, usage))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:  # seen from inside a container, outer groups are not there
        return
    if most != "max":
        yield max(int(most) - int(used) + int(counts.get(cache, 0)), 0)  # cached files make room when it is needed
