"""What a step of training asks of the card: kernels, and waits of the host. (A token of an answer: decoding.wide.)"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from accessory.checkpoint.training_state import Progress
from tools.benchmarking.launches import Counts, LaunchCounter
from tools.gpu_checks.check import Findings, Ground, check
from tools.gpu_checks.families import training
from tools.gpu_checks.rates import synchronize
from tools.model_sizes import SIZES

MOST_WAITS = 8
"""Of a step: for its loss and its gradient's norm, and a few."""
MOST_OF_A_BLOCK = 170
"""Kernels of a block, forward and backward; 150 with LoRA by `tools/launches.py`."""
OFF = 0.2
"""Share by which the count may be wrong: libraries launch more than one kernel for some products."""


@check(10, needs_cuda=True)
def training_step(ground: Ground, found: Findings) -> None:
    """Kernels of a step of 7B's width, of 2 blocks and of 3: what one block takes; and how often the host waits."""
    with TemporaryDirectory() as folder:
        for method in ("lora", "normbias"):
            with found.case(method):
                _note(found, method, *(_of_step(ground, method, depth, Path(folder)) for depth in (2, 3)), ground)


class Step(NamedTuple):
    """kernels: by name, as the profiler saw them. waits: by the line where the host waited. counted: as computed."""

    kernels: Counter
    waits: Counter
    counted: Counts


def _note(found: Findings, method: str, two: Step, three: Step, ground: Ground) -> None:
    """Figures of steps with 2 blocks and with 3."""
    block, waits = three.kernels.total() - two.kernels.total(), three.waits.total()
    counted = three.counted.launches - two.counted.launches
    found.figures[method] = {
        "a_block": block, "counted": counted, "the_rest": two.kernels.total() - 2 * block,
        "the_rest_counted": two.counted.launches - 2 * counted, "waits": waits, "waits_counted": three.counted.syncs,
    }  # fmt: skip
    found.figures[f"{method}_block"] = dict((three.kernels - two.kernels).most_common(12))
    found.figures[f"{method}_waits"] = dict(three.waits)
    if not ground.cuda:
        return
    found.expect(waits <= MOST_WAITS, f"{method}: the host waits {waits} times a step")
    found.expect(block <= MOST_OF_A_BLOCK, f"{method}: a block takes {block} kernels")
    near = abs(block - counted) <= OFF * block
    found.expect(near, f"{method}: a block takes {block} kernels; tools/launches.py counts {counted}")


def _of_step(ground: Ground, method: str, depth: int, folder: Path) -> Step:
    """A step of a model with so many blocks."""
    file = folder / f"{depth}.json"
    file.write_text(json.dumps(SIZES[ground.pick("7B", "tiny")] | {"n_layers": depth, "vocab_size": 32000}))
    length = ground.pick(1024, 32)
    run = training(model=str(file), method=method, batch_size=2, seq=(length,), max_words=length)
    engine = run.engine(ground.layout)
    engine.settings = replace(engine.settings, pin_memory=ground.cuda)
    engine.model.train()
    progress = Progress()

    def step() -> None:
        """One of the engine's."""
        engine.step(progress)

    step()
    kernels, waits = kernels_of(step, ground), _waits_of(step, ground)
    with LaunchCounter(ground.device.type) as counter:
        step()
    return Step(kernels, waits, counter.total())


def kernels_of(call: Callable[[], object], ground: Ground) -> Counter:
    """Names of the kernels and copies that `call` launches; on a CPU, its operations."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ground.cuda else [])]
    with profile(activities=activities) as profiled:
        call()
        synchronize(ground.device)
    wanted = torch.autograd.DeviceType.CUDA if ground.cuda else torch.autograd.DeviceType.CPU
    events = (event for event in profiled.events() if event.device_type == wanted and not event.is_user_annotation)
    return Counter(event.name[:60] for event in events if not event.name.startswith("Memset"))


def _waits_of(step: Callable[[], None], ground: Ground) -> Counter:
    """Where the host waits for the card in a step, as PyTorch warns of it."""
    if not ground.cuda:
        return Counter()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    waits = (one for one in told if "synchroniz" in str(one.message))
    return Counter(f"{Path(one.filename).name}:{one.lineno}" for one in waits)


CHECKS = [training_step]
