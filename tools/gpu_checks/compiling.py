"""Triton's kernels, compiled by all cores at once in all variants that the checks use: one core needs minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tools.gpu_checks.check import Findings, Ground, Skipped, check

COMPILER = Path(__file__).with_name("compiler.py")
ROOT = COMPILER.parents[2]
PATIENCE = 200.0  # seconds
H200, FEW = (9, 0), (2, 16)
"""What a rehearsal compiles for, and how many of how many shares."""


@check(30, needs_cuda=True)
def kernels(ground: Ground, found: Findings) -> None:
    """Each process compiles its share; the results lie on disk, where later checks find them."""
    if find_spec("triton") is None:
        raise Skipped("needs Triton")
    major, minor = torch.cuda.get_device_capability(ground.device) if ground.cuda else H200
    count, shares = ground.pick((len(os.sched_getaffinity(0)),) * 2, FEW)
    what = str(10 * major + minor), str(shares), "tiny" if ground.tiny else "full"
    with TemporaryDirectory() as aside:
        environment = _environment() | ({} if ground.cuda else {"TRITON_CACHE_DIR": aside})
        began, answers = time.monotonic(), []
        processes = [
            subprocess.Popen(
                [sys.executable, COMPILER, *what, str(i)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
            ) for i in range(count)
        ]  # fmt: skip
        try:
            for process in processes:
                words, _ = process.communicate(timeout=max(began + PATIENCE - time.monotonic(), 0))
                answers.append(json.loads(words.splitlines()[-1]) if words else {})
        finally:
            for process in processes:
                process.kill()
    found.figures |= {"processes": count, "seconds": round(time.monotonic() - began, 1)}
    judge(answers, found)


def judge(answers: list[dict], found: Findings) -> None:
    """Note the processes' figures; all must have found the same variants, each of which one of them compiles."""
    variants = {answer.get("variants", 0) for answer in answers}
    found.figures |= {"variants": max(variants), "compiled": sum(answer.get("compiled", 0) for answer in answers)}
    found.expect(len(variants) == 1 and variants != {0}, f"processes found {sorted(variants)} variants")
    for fault in dict.fromkeys(fault for answer in answers for fault in answer.get("faults", ())):
        found.faults.append(fault)


def _environment() -> dict[str, str]:
    """Without a GPU, an interpreter, and the process group that this process is in."""
    ours = ("TRITON_INTERPRET", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


CHECKS = [kernels]
