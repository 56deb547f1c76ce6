"""Numbers that are not finite, and memory that runs out. Numbers of tests are those of the list in README."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from accessory.checkpoint.manifest import verify
from tests.faults.job import Job, said


@pytest.fixture(scope="module")
def not_finite(tiny_base: Path, dropout_lora: Path, tmp_path_factory: pytest.TempPathFactory, torchrun) -> Path:
    """What `numbers_worker.py` leaves."""
    folder = tmp_path_factory.mktemp("numbers")
    flags = Job(tiny_base, dropout_lora, folder / "unused", {}).flags("--max_steps", "5")
    (folder / "flags.json").write_text(json.dumps(flags))
    worker = Path(__file__).with_name("numbers_worker.py")
    done = torchrun(2, worker, folder / "flags.json", folder / "out", folder / "results.json")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_22_a_number_that_is_not_finite_stops_all_before_the_optimizer(not_finite: Path) -> None:
    """On one rank, in one of its micro-batches: the same step on both, nothing changed, the documents named."""
    first, second = json.loads((not_finite / "results.json").read_text())
    assert [fired for _, _, fired, *_ in first] == [False] * 4
    assert [fired for _, _, fired, *_ in second] == [True] * 4
    for (kind, message, _, _, step, unchanged), (_, other, _, ids, other_step, other_unchanged) in list(
        zip(first, second, strict=True)
    )[:3]:
        assert message == other and (step, other_step) == (3, 3)
        assert unchanged and other_unchanged, kind
        assert message.startswith("NotFiniteError: Step 3: the loss is "), kind
        named = [int(i) for i in re.findall(r"(\d+) \([^ ]*accessory_qa\.json:\d+\)", message)]
        if kind == "inf gradient":
            assert "Every micro-batch has a finite loss; documents of the step: " in message
            assert len(named) == 8 and set(ids) < set(named)
        else:
            assert "Documents whose micro-batch has no finite loss: " in message
            assert named == sorted(ids)
    status = json.loads((not_finite / "out" / "nan" / "run_status.json").read_text())
    assert (status["status"], status["reason"], status["step"]) == (5, "NotFiniteError", 2)


def test_22_or_all_skip_the_step(not_finite: Path) -> None:
    first, second = json.loads((not_finite / "results.json").read_text())
    assert first[3][1] == second[3][1] == "nothing was raised"
    run = not_finite / "out" / "nan_--not_finite_skip"
    for file in ("trainable", "training_state"):
        before, skipped, after = (load_file(run / f"epoch0-iter{n}" / f"{file}.safetensors") for n in (2, 3, 4))
        moved = [name for name in before if not name.startswith("generator")]
        assert all(before[name].equal(skipped[name]) for name in moved)
        assert not all(skipped[name].equal(after[name]) for name in moved)
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert losses[2] is None and all(losses[:2] + losses[3:])


def test_23_out_of_memory_on_one_rank(job: Job) -> None:
    """What the GPU's allocator raises: the micro-batch and its lengths, and what would help; both ranks end."""
    done = job.run(faults=[{"do": "out_of_memory", "rank": 1, "step": 6}])
    assert job.fired == ["out_of_memory-rank1-attempt0"]
    ours = said(done)
    assert re.search(
        r"OutOfMemoryError: \[rank 1\] Step 6: out of memory in micro-batch 1 of 2, which has \d+ tokens in documents "
        r"of \d+, \d+\. What is saved is whole\. Less memory is needed with .*--max_words.*--batch_size.*adamw8bit",
        ours,
    )
    assert "--checkpointing" in ours and "Traceback" not in ours
    assert (job.status["status"], job.status["reason"], job.status["step"]) == (1, "OutOfMemoryError", 4)
    assert verify(job.output / "epoch0-iter4") == 4


def test_23_out_of_memory_on_the_cpu(job: Job) -> None:
    """A limit on the address space: the CPU's allocator has no error of its own."""
    job.ranks = 1
    done = job.run(faults=[{"do": "limit_memory", "rank": 0, "step": 6}])
    assert job.fired == ["limit_memory-rank0-attempt0"]
    assert "OutOfMemoryError: Step 6: out of memory in micro-batch 1 of 4" in said(done)
    assert job.status["reason"] == "OutOfMemoryError"


def test_23_another_error_is_not_taken_for_it(job: Job) -> None:
    job.ranks = 1
    done = job.run(faults=[{"do": "raise", "rank": 0, "step": 2}])
    assert "AccessoryError: KeyError: 'a fault of the program'" in said(done)
    assert "memory" not in said(done).replace("memory plan", "")
