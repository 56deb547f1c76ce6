"""The process that runs checks, one after the other as it is told: a crash or a hang takes no other check with it.

It reads lines from standard input, each the name of a check, and answers in lines of JSON to the descriptor it is
given. What checks print goes wherever the parent sent it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

ROOMS = (
    "environment", "compiling", "kernels", "storages", "attention", "families", "runs", "launches", "speed", "decoding",
    "engine", "images",
)  # fmt: skip
"""Files of checks, in the order in which they run: what has to be known first comes first."""


def main(answers: int, device: str, tiny: bool) -> None:
    """Tell which checks there are, then run those that are asked for; a name of a room runs none.

    answers: the descriptor. device: cpu, or cuda for the first GPU.
    """
    with os.fdopen(answers, "w", buffering=1) as out:

        def say(**words: object) -> None:
            """A line for the parent."""
            out.write(json.dumps(words, default=str) + "\n")

        checks, broken = {}, {}
        for room in ROOMS:
            try:
                checks |= {one.name: one for one in import_module(f"tools.gpu_checks.{room}").CHECKS}
            except Exception as error:  # a missing package must not prevent the other rooms' checks
                broken[f"{room}.import"] = f"{type(error).__name__}: {error}"
        told = [{part: getattr(c, part) for part in ("name", "seconds", "by_name", "beside")} for c in checks.values()]
        ready = _prepared(device, tiny)
        say(checks=told, broken=broken, **ready[1])
        for line in sys.stdin:
            answer, lost = _run(checks[line.strip()], ready[0])
            say(**answer, lost=lost)
            if lost:
                break
    os._exit(0)


def _prepared(device: str, tiny: bool) -> tuple:
    """(the ground, {}), or (None, why there is none)."""
    try:
        import torch

        from accessory.parallel import groups
        from tools.gpu_checks.check import Ground

        torch.manual_seed(0)
        torch.set_float32_matmul_precision("highest")
        return Ground(groups.start(device), tiny), {}
    except Exception as error:
        return None, {"unusable": f"{type(error).__name__}: {error}"}


def _run(check, ground) -> tuple[dict, bool]:
    """(what a check found, whether this process is of no more use)."""
    from tools.gpu_checks.check import Findings, Skipped, brief, is_device_lost
    from tools.gpu_checks.rates import synchronize

    found, lost, status, words = Findings(), False, "passed", ""
    try:
        with compiling_counted(found.figures):
            check.run(ground, found)
        synchronize(ground.device)
    except Skipped as reason:
        status, words = "skipped", str(reason)
    except Exception as error:
        lost = is_device_lost(error)
        found.faults.append(brief(error))
    if not lost:
        try:
            _forget(ground.device)
        except Exception as error:
            lost = True
            found.faults.append(f"the device is lost: {brief(error)}")
    if found.faults:
        status, words = "failed", "\n".join(found.faults)
    elif status == "passed" and check.needs_cuda and not ground.cuda:
        status, words = "skipped", "needs CUDA; rehearsed on the CPU"
    return {"status": status, "message": words, "figures": found.figures}, lost


@contextmanager
def compiling_counted(figures: dict[str, object]) -> Iterator[None]:
    """Inside this context figures["compiled_late"] counts kernels that Triton had to compile, if there are any."""
    if find_spec("triton") is None:
        yield
        return
    from triton import knobs

    def count(*, cache_hit: bool, **_rest: object) -> None:
        """Triton's hook."""
        if not cache_hit:
            figures["compiled_late"] = figures.get("compiled_late", 0) + 1

    before, knobs.compilation.listener = knobs.compilation.listener, count
    try:
        yield
    finally:
        knobs.compilation.listener = before


def _forget(device) -> None:
    """Free what the last check left."""
    from accessory.quant import workspace
    from tools.gpu_checks.rates import begin_peak

    workspace.forget(device)
    begin_peak(device)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3] == "tiny")
