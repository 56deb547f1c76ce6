"""What a worker knows of the launcher that started it: torchrun, or SLURM's srun."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def restart_count() -> int:
    """How often torchrun (`--max-restarts`) or SLURM (`--requeue`) has started this run before."""
    return sum(int(os.environ.get(name, "0")) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def launch_name() -> str | None:
    """What all attempts of one launch have in common: torchrun's run id or SLURM's job number, where there is one."""
    return next((os.environ[name] for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID") if name in os.environ), None)


def die_with_launcher() -> None:
    """Have the kernel kill this worker when its torchrun dies: an orphan would train on and write beside the next run.

    Nothing happens where no torchrun started the process, or elsewhere than on Linux. To be called before anything that
    takes long to import: until then, a worker outlives a launcher that is killed.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    launcher = os.getppid()
    die_with_parent(launcher)
    if launcher == 1 and b"torch" not in Path("/proc/1/cmdline").read_bytes():
        os.kill(os.getpid(), signal.SIGKILL)  # the launcher died before this was set


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its `parent` dies, at once if it is dead. Only on Linux."""
    if sys.platform != "linux":
        return
    _at_launchers_death(signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def outlive_launcher() -> None:
    """Undo `die_with_launcher`: a worker that was asked to stop saves and ends even if torchrun leaves before it."""
    if sys.platform == "linux":
        _at_launchers_death(0)


def _at_launchers_death(number: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
