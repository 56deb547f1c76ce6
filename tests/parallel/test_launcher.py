"""What a worker makes of its launcher's variables, and of its death."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from accessory.parallel.launcher import restart_count
from tests.conftest import ROOT
from tests.faults.job import alive, wait_for

WORKER = (
    "import os, time; from accessory.parallel.launcher import die_with_launcher, outlive_launcher\n"
    "die_with_launcher(){more}; print(os.getpid(), flush=True); time.sleep(60)"
)
LAUNCHER = (
    "import os, subprocess, sys, time\n"
    "subprocess.Popen([sys.executable, '-c', {worker!r}])\n"
    "time.sleep(60)"
)  # fmt: skip


@pytest.mark.parametrize(("variables", "dies"), [({"TORCHELASTIC_RUN_ID": "1"}, True), ({}, False)])
@pytest.mark.parametrize("asked_to_stop", [False, True])
def test_an_orphan_dies_unless_it_is_saving(variables: dict, dies: bool, asked_to_stop: bool) -> None:
    """Or was started by something else than torchrun, which may well leave before it."""
    worker = WORKER.format(more="; outlive_launcher()" if asked_to_stop else "")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER.format(worker=worker)],
        env=environment | variables, cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    process = int(launcher.stdout.readline())
    assert alive(process)
    launcher.kill()
    launcher.wait()
    if dies and not asked_to_stop:
        wait_for(lambda: not alive(process), seconds=30)
    else:
        with pytest.raises(AssertionError):
            wait_for(lambda: not alive(process), seconds=0.5)
        os.kill(process, 9)


def test_starts_are_counted_over_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert restart_count() == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert restart_count() == 3
