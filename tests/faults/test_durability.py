"""Checkpoints that survive kills, damage, full disks and each other. Numbers: docs/reliability.md."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from accessory.checkpoint.manifest import MANIFEST_FILE, read_manifest, verify
from accessory.checkpoint.run_checkpoints import Retention, checkpoints_in, latest_checkpoint
from accessory.config import FinetuneConfig, parse
from accessory.errors import CheckpointError, ConfigError
from accessory.finetuning import finetune
from tests.checkpoint.made_checkpoints import checkpoint, flip
from tests.faults.job import Job, finish, said, wait_for

KILLS, LONG = (25, 90) if os.environ.get("CHAOS") else (2, 12)
PIECES = ("trainable.safetensors", "training_state.safetensors", "training_state.json", "run.json", MANIFEST_FILE)


def test_07_killed_at_random_moments(job: Job, tmp_path: Path) -> None:
    """Launcher and ranks at once, while they save after every step; started again until the run is done.

    No start is lost, no step repeated beyond the interval, nothing half written stays, and the end is the twin's.
    """
    generator, steps, kills = random.Random(int(os.environ.get("CHAOS", "0"))), [0], 0
    long = ("--save_steps", "1", "--max_steps", str(LONG), "--epochs", "6", "--keep_last", "9")
    while kills < KILLS and steps[-1] < LONG - 1:
        resume = ["--resume", "latest"] if checkpoints_in_or_none(job) else []
        process = job.start(*long, *resume)
        if generator.random() < 0.2:  # perhaps before it trains
            time.sleep(generator.uniform(0, 8))
        else:
            wait_for(lambda process=process: reached(job) > steps[-1] or process.poll() is not None)
            time.sleep(generator.uniform(0, 0.4))
        if process.poll() is not None:  # it got to its end first
            assert finish(process).returncode == 0
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        if not checkpoints_in_or_none(job):
            continue
        found, faults = latest_checkpoint(job.output)
        assert not faults
        steps.append(read_manifest(found)["step"])
        assert steps[-1] >= max(steps[-2], logged(job) - 1), (steps, logged(job))
    done = job.run(*long, "--resume", "latest")
    assert done.returncode == 0, done.stderr[-3000:]
    twin = Job(job.base, job.method, tmp_path / "twin", job.environment)
    assert twin.run(*long).returncode == 0
    last = f"epoch{(LONG - 1) // 19}-iter{(LONG - 1) % 19 + 1}"
    assert job.digest(last) == twin.digest(last)
    assert job.losses == twin.losses and len(twin.losses) == LONG
    assert not list(job.output.glob(".epoch*"))
    print(f"\n{kills} kills, stood after steps {steps}", flush=True)
    assert kills == KILLS


def checkpoints_in_or_none(job: Job) -> list[Path]:
    """What it has saved so far."""
    return checkpoints_in(job.output) if job.output.is_dir() else []


def reached(job: Job) -> int:
    """The step of its newest checkpoint."""
    return max((read_manifest(path)["step"] for path in checkpoints_in_or_none(job)), default=0)


def logged(job: Job) -> int:
    """The last step in its log."""
    return max(job.losses, default=0)


def test_08_every_stage_of_a_save_may_fail(job: Job, tmp_path: Path, torchrun) -> None:
    """On the main rank, which writes: both ranks raise the same error, and the checkpoint before is whole."""
    flags, results = tmp_path / "flags.json", tmp_path / "results.json"
    flags.write_text(json.dumps(job.flags("--max_steps", "2", "--save_steps", "1")))
    done = torchrun(2, Path(__file__).with_name("stages_worker.py"), flags, tmp_path / "out", results)
    assert done.returncode == 0, done.stderr[-3000:]
    main, other = json.loads(results.read_text())
    assert len(main) == 6
    for stage, (kind, message, fired) in main.items():
        assert fired and other[stage][:2] == [kind, message], stage
        assert kind == "CheckpointError" and "Input/output error" in message, (stage, kind, message)
    for run in (tmp_path / "out").iterdir():
        assert [path.name for path in run.glob("*epoch*")] == ["epoch0-iter1"], run
        assert verify(run / "epoch0-iter1") == 1


@pytest.mark.parametrize("way", ["fail_as_weights_are_gathered", "fail_as_state_is_gathered"])
def test_08_so_may_the_part_of_a_rank_that_does_not_write(job: Job, way: str) -> None:
    """The main rank, in the midst of writing or about to, says the other's error and leaves nothing half written."""
    done = job.run(faults=[{"do": way, "rank": 1, "step": 6}])
    assert job.fired == [f"{way}-rank1-attempt0"]
    cause = "[rank 1] OSError: [Errno 5] Input/output error"
    assert f"AccessoryError: {cause}" in said(done) and "Connection closed" not in said(done)
    assert (job.status["status"], job.status["message"], job.status["step"]) == (1, cause, 4)
    assert [path.name for path in job.output.glob("*epoch*")] == ["epoch0-iter4"]
    assert verify(job.output / "epoch0-iter4") == 4


@pytest.fixture(scope="module")
def two_saves(tiny_base: Path, dropout_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job with checkpoints after steps 1 and 2."""
    job = Job(tiny_base, dropout_lora, tmp_path_factory.mktemp("two") / "run", {}, ranks=1)
    finetune(parse(FinetuneConfig, job.flags("--max_steps", "2", "--save_steps", "1")))
    return job


def copied(two_saves: Job, tmp_path: Path) -> tuple[Path, Path]:
    """(older, newer) checkpoint, to be damaged."""
    run = shutil.copytree(two_saves.output, tmp_path / "run")
    return run / "epoch0-iter1", run / "epoch0-iter2"


@pytest.mark.parametrize("piece", PIECES)
def test_09_a_flipped_bit_is_found(two_saves: Job, tmp_path: Path, piece: str) -> None:
    older, newer = copied(two_saves, tmp_path)
    flip(newer / piece)
    found, faults = latest_checkpoint(newer.parent)
    assert found == older
    assert len(faults) == 1 and str(newer) in faults[0] and (piece in faults[0] or piece == MANIFEST_FILE)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99, None])
@pytest.mark.parametrize("piece", PIECES)
def test_10_a_cut_or_missing_piece_is_found(two_saves: Job, tmp_path: Path, piece: str, share: float | None) -> None:
    older, newer = copied(two_saves, tmp_path)
    if share is None:
        (newer / piece).unlink()
    else:
        os.truncate(newer / piece, int(share * (newer / piece).stat().st_size))
    found, faults = latest_checkpoint(newer.parent)
    assert found == older and len(faults) == 1 and piece in faults[0]


def test_10_with_none_whole_a_run_never_begins_anew(two_saves: Job, tmp_path: Path, python) -> None:
    """Not with --resume latest, not as a restarted attempt, and not without a word in the same directory either."""
    older, newer = copied(two_saves, tmp_path)
    os.truncate(older / "trainable.safetensors", 100)
    (newer / MANIFEST_FILE).unlink()
    script = Path(__file__).resolve().parent.parent.parent / "accessory" / "main_finetune.py"
    flags = two_saves.flags("--output_dir", str(newer.parent))
    for more, variables, status, words in (
        ([], {"TORCHELASTIC_RESTART_COUNT": "1"}, 4, f"no checkpoint in {newer.parent} is whole"),
        (["--resume", "latest"], {}, 4, f"no checkpoint in {newer.parent} is whole"),
        ([], {}, 2, "holds checkpoints further than where this run begins: epoch0-iter1, epoch0-iter2"),
    ):
        done = python(script, *flags, *more, **variables)
        assert done.returncode == status, done.stderr
        assert words in done.stderr and "Traceback" not in done.stderr
        assert "step      1" not in done.stdout
    status = json.loads((newer.parent / "run_status.json").read_text())
    assert (status["state"], status["status"], status["reason"]) == ("failed", 2, "ConfigError")


def test_11_pieces_of_another_step_are_found(two_saves: Job, tmp_path: Path) -> None:
    older, newer = copied(two_saves, tmp_path)
    shutil.copy(older / "training_state.safetensors", newer)
    found, faults = latest_checkpoint(newer.parent)
    assert found == older and "training_state.safetensors has other contents than were saved" in faults[0]


def test_12_a_full_disk_is_called_that(job: Job, tmp_path: Path) -> None:
    """As the second checkpoint is written: status 6, the first is whole, and nothing of the second is there."""
    done = job.run(faults=[{"do": "limit_files", "rank": 0, "step": 6}])
    assert job.fired == ["limit_files-rank0-attempt0"]
    ours = said(done)
    assert f"DiskFullError: [rank 0] {job.output / 'epoch0-iter8'}: the disk is full, or a limit on it" in ours
    assert "bytes are free" in ours
    assert (job.status["status"], job.status["reason"], job.status["step"]) == (6, "DiskFullError", 4)
    assert [path.name for path in job.output.glob("*epoch*")] == ["epoch0-iter4"]
    assert verify(job.output / "epoch0-iter4") == 4


def test_12_a_disk_too_small_is_found_before_the_first_step(job: Job, small_disk: Path, python) -> None:
    script = Path(__file__).resolve().parent.parent.parent / "accessory" / "main_finetune.py"
    done = python(script, *job.flags("--output_dir", str(small_disk)))
    assert done.returncode == 6
    assert f"DiskFullError: {small_disk}: the disk is full: a checkpoint needs " in done.stderr
    assert "step      1" not in done.stdout


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of one mebibyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_13_the_last_whole_ones_and_the_best_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged ones neither count nor go; what cannot be removed is told, and goes the next time."""
    for step, loss in enumerate([3.0, 1.0, 2.5, 2.0, 1.5], start=1):
        checkpoint(tmp_path / f"epoch{step}", step, loss)
    flip(tmp_path / "epoch4" / "trainable.safetensors")
    keep = Retention(tmp_path, keep_last=2)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        assert keep.prune() == [f"{tmp_path / 'epoch1'}: could not be removed (Permission denied)"]
    assert keep.prune() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch2", "epoch3", "epoch4", "epoch5"]
    checkpoint(tmp_path / "epoch6", 6, 0.5)
    assert keep.prune() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch4", "epoch5", "epoch6"]
    with pytest.raises(ConfigError, match=r"--keep_last is '1': Input should be greater than or equal to 2"):
        parse(FinetuneConfig, ["--pretrained_path", str(tmp_path), "--data_config", "x.json", "--keep_last", "1"])


def test_13_a_run_keeps_what_it_is_told(job: Job) -> None:
    job.ranks = 1
    finetune(parse(FinetuneConfig, job.flags("--max_steps", "6", "--save_steps", "1", "--keep_last", "2")))
    kept = {read_manifest(path)["step"] for path in checkpoints_in(job.output)}
    best = min(job.losses, key=job.losses.get)
    assert kept == {5, 6, best}


def test_13_overwriting_removes_another_course_of_the_run(job: Job) -> None:
    """Going on from an older checkpoint in its own directory: the newer ones would be taken for this run's."""
    job.ranks = 1
    finetune(parse(FinetuneConfig, job.flags("--max_steps", "4", "--save_steps", "2")))
    back = job.flags("--max_steps", "3", "--resume", str(job.output / "epoch0-iter2"))
    with pytest.raises(ConfigError, match=r"further than where this run begins: epoch0-iter4\. .*--overwrite"):
        finetune(parse(FinetuneConfig, back))
    finetune(parse(FinetuneConfig, [*back, "--overwrite"]))
    assert [path.name for path in checkpoints_in(job.output)] == ["epoch0-iter2", "epoch0-iter3"]


def test_checkpoint_error_is_what_all_of_them_are(two_saves: Job, tmp_path: Path) -> None:
    """A damaged checkpoint that is named outright is refused, not passed over."""
    _, newer = copied(two_saves, tmp_path)
    flip(newer / "trainable.safetensors")
    with pytest.raises(CheckpointError, match=r"epoch0-iter2: is damaged: trainable\.safetensors"):
        finetune(parse(FinetuneConfig, two_saves.flags("--resume", str(newer), "--output_dir", str(tmp_path / "new"))))
