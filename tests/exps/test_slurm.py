"""The SLURM job saves when its time is nearly over, goes back into the queue, and goes on where it stood.

There is no SLURM here: `srun` and `scontrol` are stand-ins that start processes with its variables and keep a record.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "exps" / "slurm" / "finetune.sh"
SRUN = """#!{python}
import os, signal, subprocess, sys, time
from pathlib import Path

command = [word for word in sys.argv[1:] if not word.startswith("--kill-on-bad-exit")]
names = ("SLURM_PROCID", "SLURM_LOCALID")
settings = [os.environ | dict.fromkeys(names, str(task)) | {{"SLURM_NTASKS": "2"}} for task in (0, 1)]
tasks = [subprocess.Popen(command, env=its) for its in settings]
if "SLURM_RESTART_COUNT" not in os.environ:  # the first time, the time is over after a few steps
    while not list(Path(os.environ["OUTPUT"]).glob("epoch0-iter2")):
        time.sleep(0.05)
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two tasks."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    (stand_ins / "srun").write_text(SRUN.format(python=sys.executable))
    (stand_ins / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.log\n')
    for file in stand_ins.iterdir():
        file.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = f"{stand_ins}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return environment() | {
        "PATH": path, "SLURM_JOB_ID": "4711", "SLURM_SUBMIT_DIR": str(ROOT), "OUTPUT": str(tmp_path / "out"),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip


def test_a_job_that_runs_out_of_time_goes_on(slurm: dict[str, str], tiny_base: Path, tmp_path: Path) -> None:
    data = ROOT / "data_example" / "accessory_qa.json"
    command = [
        "bash", str(SCRIPT), str(tiny_base), "--data_config", str(data),
        "--device", "cpu", "--max_words", "160", "--save_steps", "1", "--max_steps", "30",
    ]  # fmt: skip
    run = lambda **more: subprocess.run(command, env=slurm | more, capture_output=True, text=True, timeout=200)  # noqa: E731
    first = run()
    assert first.returncode == 0, first.stderr[-3000:]
    assert "Preempted: Stopped by SIGUSR1 after step " in first.stderr
    assert "== ended as: preempted" in first.stdout
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4711\n"
    stood = json.loads((tmp_path / "out" / "run_status.json").read_text())
    assert (stood["state"], stood["status"]) == ("preempted", 75) and 2 <= stood["step"] < 30
    second = run(SLURM_RESTART_COUNT="1", MASTER_PORT=str(int(slurm["MASTER_PORT"]) + 1))
    assert second.returncode == 0, second.stderr[-3000:]
    assert f"resuming {tmp_path / 'out' / stood['checkpoint']} after step {stood['step']}" in second.stdout
    ended = json.loads((tmp_path / "out" / "run_status.json").read_text())
    assert (ended["state"], ended["step"], ended["began_after"]) == ("finished", 30, [0, stood["step"]])
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4711\n"  # and not again
