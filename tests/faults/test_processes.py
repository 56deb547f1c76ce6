"""Faults of processes: killed, hanging, signalled, failing, unlike. Numbers: docs/reliability.md."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from accessory.checkpoint.manifest import read_manifest, verify
from accessory.checkpoint.run_checkpoints import latest_checkpoint
from tests.faults.job import FORCED, SIZE, Job, alive, finish, said, settings, wait_for, workers_of

REPEATS = 10 if os.environ.get("CHAOS") else 1
LAST = "epoch0-iter12"


@pytest.mark.parametrize("repetition", range(REPEATS))
def test_15_a_killed_rank_is_restarted_and_ends_as_its_twin(job: Job, twin: Job, repetition: int) -> None:
    job.launcher = ["--max-restarts=1"]
    done = job.run(faults=[{"do": "kill", "rank": 1, "step": 7, "attempt": 0}])
    assert job.fired == ["kill-rank1-attempt0"]
    assert done.returncode == 0, done.stderr[-3000:]
    assert (job.status["attempt"], job.status["began_after"]) == (1, [0, 4])
    assert "attempt 1, started again: goes on from" in done.stdout
    assert job.digest(LAST) == twin.digest(LAST)
    assert job.losses == twin.losses


def test_16_restarts_without_progress_end(job: Job) -> None:
    job.launcher = ["--max-restarts=2"]
    done = job.run(faults=[{"do": "kill", "rank": 1, "step": 2}])
    assert job.fired == ["kill-rank1-attempt0", "kill-rank1-attempt1"]  # the third does not even begin
    assert done.returncode == 1
    assert job.status["state"] == "failed" and job.status["began_after"] == [0, 0, 0]
    assert job.status["message"].startswith("No progress since step 0: 3 attempts in a row began there")
    assert "rank 1 (process " in job.status["message"]


@pytest.mark.parametrize("way", ["stop", "sleep", "hold"])
def test_17_a_hanging_rank_ends_all(job: Job, twin: Job, way: str) -> None:
    """SIGSTOP, a step that does not end, and an extension that never gives the interpreter back."""
    timeout = min(max(5, round(twin.seconds / 3)), 60)  # a busy machine keeps healthy ranks waiting, too
    process = job.start("--timeout", str(timeout), faults=[{"do": way, "rank": 1, "step": 6}])
    wait_for(lambda: job.fired == [f"{way}-rank1-attempt0"])
    workers, began = workers_of(process.pid), time.monotonic()
    done = finish(process)
    assert time.monotonic() - began < 25 * job.pace + timeout and FORCED not in done.stderr
    assert len(workers) == 2 and not any(alive(worker) for worker in workers)
    assert f"LostRankError: rank 1 (process {workers[1]} on " in said(done)
    assert f"no longer answers: killed, or hanging (Timed out waiting {timeout}000ms" in said(done)
    assert (job.status["state"], job.status["status"], job.status["step"]) == ("failed", 7, 4)
    assert verify(job.output / "epoch0-iter4") == 4


SILENT = r"rank 1 \(process \d+ on .*\) no longer answers: killed, or hanging"


@pytest.mark.parametrize(
    ("way", "status", "message"),
    [
        pytest.param("kill", 7, rf"{SILENT} \(rank 1 closed its connection\)\.", id="kill"),
        pytest.param("stop", 7, rf"{SILENT} \(no progress for \d+ s\)\.", id="stop"),
        pytest.param("raise", 1, r"\[rank 1\] KeyError: 'a fault of the program'", id="raise"),
    ],
)
def test_17_a_wait_that_nothing_interrupts_is_ended(job: Job, twin: Job, way: str, status: int, message: str) -> None:
    """Rank 0's main thread waits as in NCCL, and would for ever: no exception reaches it, and no signal."""
    timeout = min(max(5, round(twin.seconds / 3)), 60) if way == "stop" else 600
    process = job.start(
        *("--timeout", str(timeout)),
        faults=[{"do": "wait_as_nccl_does", "rank": 0, "step": 6}, {"do": way, "rank": 1, "step": 6}],
    )
    wait_for(lambda: job.fired == [f"{way}-rank1-attempt0", "wait_as_nccl_does-rank0-attempt0"])
    workers, began = workers_of(process.pid), time.monotonic()
    done = finish(process)
    seconds = time.monotonic() - began
    assert seconds < (20 + timeout * (way == "stop")) * job.pace and FORCED not in done.stderr, seconds
    assert not any(alive(worker) for worker in workers)
    assert (job.status["state"], job.status["status"], job.status["step"]) == ("failed", status, 4)
    assert re.fullmatch(message, job.status["message"])
    assert done.stderr.split("ChildFailedError")[0].count(f"Error: {job.status['message']}\n") == 1


def test_18_sigterm_to_the_launcher_during_a_save(job: Job, twin: Job) -> None:
    """Twice. The save ends, all ranks stop after that step, and the resumed run ends as its twin."""
    done = job.run(faults=[{"do": "end_launcher_in_save", "rank": 0, "step": 7}])
    assert job.fired == ["end_launcher_in_save-rank0-attempt0"]
    assert done.seconds < 60 * job.pace and done.returncode != 0
    status = job.status
    assert (status["state"], status["status"]) == ("preempted", 75)
    assert status["message"].startswith(f"Stopped by SIGTERM after step {status['step']}, which is saved as ")
    assert read_manifest(job.output / status["checkpoint"])["step"] == status["step"] in (8, 9)
    assert not list(job.output.glob(".epoch*"))
    again = job.run("--resume", "latest")
    assert again.returncode == 0, again.stderr[-3000:]
    assert job.status["state"] == "finished"
    assert job.digest(LAST) == twin.digest(LAST)


@pytest.mark.parametrize("way", ["terminate", "interrupt"])
def test_19_a_signal_to_one_rank_stops_all_after_the_same_step(job: Job, twin: Job, way: str) -> None:
    """In the middle of accumulating a step's gradients: that step is finished first."""
    done = job.run(faults=[{"do": way, "rank": 1, "step": 6}])
    assert job.fired == [f"{way}-rank1-attempt0"]
    name = {"terminate": "SIGTERM", "interrupt": "SIGINT"}[way]
    assert said(done).count(f"Preempted: Stopped by {name} after step 6, which is saved as epoch0-iter6.") >= 1
    assert (job.status["state"], job.status["status"], job.status["step"]) == ("preempted", 75, 6)
    assert latest_checkpoint(job.output) == (job.output / "epoch0-iter6", [])
    if way == "terminate":
        again = job.run("--resume", "latest")
        assert again.returncode == 0, again.stderr[-3000:]
        assert job.digest(LAST) == twin.digest(LAST)


def test_20_the_rank_that_fails_is_named_with_its_traceback(job: Job) -> None:
    process = job.start(faults=[{"do": "raise", "rank": 1, "step": 6}])
    wait_for(lambda: job.fired == ["raise-rank1-attempt0"])
    began = time.monotonic()
    done = finish(process)
    assert time.monotonic() - began < 20 * job.pace and FORCED not in done.stderr
    ours = said(done)
    assert "in strike\n" in ours and "KeyError: 'a fault of the program'" in ours
    assert "AccessoryError: [rank 1] KeyError: 'a fault of the program'" in ours
    assert "Connection closed" not in ours.split("ChildFailedError")[0]
    assert (job.status["status"], job.status["message"]) == (1, "[rank 1] KeyError: 'a fault of the program'")


def test_20_ranks_started_unlike_are_refused(job: Job, tmp_path: Path) -> None:
    """Each field with the values of two ranks, before any weight is read."""
    other = tmp_path / "other.json"
    other.write_text(settings(8, 0.2))
    flags, unlike = json.dumps(job.flags()), json.dumps([*job.flags("--llama_config", str(other)), "--lr", "0.5"])
    starter = tmp_path / "starter.py"
    starter.write_text(
        "import json, os, sys\n"
        f"flags = json.loads({flags!r}) if os.environ['RANK'] == '0' else json.loads({unlike!r})\n"
        f"os.execv(sys.executable, [sys.executable, {str(Path(__file__).with_name('faulty_worker.py'))!r}, *flags])\n"
    )
    done = job.run(script=starter)
    assert "ParallelError: The processes were not started alike:\nlr: 0.01 on rank 0, 0.5 on rank 1" in said(done)
    assert job.status["status"] == 2 and not list(job.output.glob("epoch*"))
    done = job.run("--overwrite", script=starter_of_other_rank(starter, unlike, other))
    assert f"settings.{SIZE}: 4 on rank 0, 8 on rank 1" in said(done)


def starter_of_other_rank(starter: Path, unlike: str, other: Path) -> Path:
    """The same, but for --lr: only what lies in the settings' file differs."""
    path = starter.with_name("second.py")
    path.write_text(starter.read_text().replace(', "--lr", "0.5"]', "]"))
    return path


def test_20_other_collectives_are_an_error_not_a_sum(job: Job) -> None:
    """With torch's own checks, which cost too much to be always on."""
    done = job.run(faults=[{"do": "other_collective", "rank": 1, "step": 6}], TORCH_DISTRIBUTED_DEBUG="DETAIL")
    assert job.fired == ["other_collective-rank1-attempt0"]
    assert "Detected mismatch between collectives" in done.stderr
    assert job.status["state"] == "failed" and job.status["step"] == 4


def test_21_fewer_records_than_ranks_and_none(job: Job, tmp_path: Path) -> None:
    """Five records on four ranks: ranks without a document take part in the step. None: refused on all."""
    job.ranks = 4
    few = tmp_path / "few.json"
    few.write_text(json.dumps([{"instruction": f"number {i}", "output": f"it is {i}"} for i in range(5)]))
    done = job.run("--data_config", str(few))
    assert done.returncode == 0, done.stderr[-3000:]
    assert job.status["step"] == 2 and set(job.losses) == {1, 2}  # an epoch is one step of five
    few.write_text("[]")
    job.ranks = 2
    done = job.run("--data_config", str(few), "--overwrite")
    assert said(done).count("DataError: ") == 1 and "not one record can be trained on" in said(done)
    assert job.status["status"] == 3


def test_14_two_jobs_in_one_directory(job: Job) -> None:
    """The second is refused; when the first's launcher is killed, its workers die, and the directory is free."""
    first = job.start("--max_steps", "100000", "--epochs", "100000")
    wait_for(lambda: (job.output / "epoch0-iter4").is_dir())
    workers = workers_of(first.pid)
    assert len(workers) == 2
    second = job.run()
    assert f"ConfigError: [rank 0] --output_dir {job.output}: a run is at work there: process {workers[0]} on " in said(
        second
    )
    assert alive(workers[0]) and job.status["state"] == "running"  # of the first
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: not any(map(alive, workers)), seconds=2)
    first.communicate()
    third = job.run("--resume", "latest", "--epochs", "100000", "--max_steps", str(job_step(job) + 1))
    assert third.returncode == 0, third.stderr[-3000:]
    assert job.status["state"] == "finished"


def job_step(job: Job) -> int:
    """After which step its newest whole checkpoint was saved."""
    return read_manifest(latest_checkpoint(job.output)[0])["step"]
