"""Numbers that are not finite, and memory that runs out. Numbers: docs/reliability.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accessory.checkpoint.manifest import verify
from accessory.config import FinetuneConfig, parse
from accessory.errors import NotFiniteError
from accessory.finetuning import finetune
from tests.conftest import TINY_CONFIG, write_model, write_tokenizer
from tests.faults.job import SIZE, Job, said


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


def rescaled(folder: Path, factor: float, head: float = 1.0) -> Path:
    """The tiny base with a smaller w3 and a larger w2: it computes the same, and gradients between them are larger.

    `factor` times as large; a larger `head` makes all gradients larger.
    """
    base = folder / f"base-{factor:g}-{head:g}"
    base.mkdir()
    write_model(base, TINY_CONFIG)
    write_tokenizer(base)
    weights = load_file(base / "model.safetensors")
    for name in weights:
        scale = {"up_proj": 1 / factor, "down_proj": factor, "lm_head": head}.get(name.split(".")[-2], 1.0)
        weights[name] = weights[name] * scale
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    return base


@pytest.fixture
def fp16(tmp_path: Path, clean_environment: dict[str, str]) -> Job:
    """LoRA in fp16 on a base in which a gradient overflows at the first loss scales, in this process unless started."""
    if SIZE != "lora_rank":
        pytest.skip("no gradient goes back through the base that overflows")
    (tmp_path / "lora.json").write_text('{"lora_rank": 4, "norm_tuning": false, "bias_tuning": false}')
    return Job(rescaled(tmp_path, 1e3), tmp_path / "lora.json", tmp_path / "run", clean_environment, ranks=1)


def alone(job: Job, *more: str, precision: str = "fp16") -> None:
    """In this process, without --quant."""
    flags = [flag for flag in job.flags(*more, "--precision", precision) if flag != "--quant"]
    finetune(parse(FinetuneConfig, flags))


def state(job: Job, checkpoint: str) -> dict:
    """Progress, as that checkpoint has it."""
    return json.loads((job.output / checkpoint / "training_state.json").read_text())["progress"]


def test_22_fp16_finds_its_scale_and_goes_on_with_it(fp16: Job, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It reports the halvings at its start and goes on. Stopped among them and resumed, it gives the same bits."""
    alone(fp16, "--max_steps", "8", "--save_steps", "2")
    first = state(fp16, "epoch0-iter2")
    assert (first["loss_scale"], first["skipped"]) == (16384, 2)
    assert (
        capsys.readouterr().out.count(" The step is skipped: nothing is changed by it, and the loss scale halved.") >= 3
    )
    whole, fp16.output = fp16.output, tmp_path / "halves"
    alone(fp16, "--max_steps", "8", "--save_steps", "2", "--resume", str(whole / "epoch0-iter2"))
    last = state(fp16, "epoch0-iter8")
    assert last["skipped"] == 0 and 65536 > last["loss_scale"] > 1024
    assert last == json.loads((whole / "epoch0-iter8" / "training_state.json").read_text())["progress"]
    trained, twin = (load_file(run / "epoch0-iter8" / "trainable.safetensors") for run in (fp16.output, whole))
    assert all(torch.equal(value, twin[name]) for name, value in trained.items())
    assert all(value.any() for name, value in trained.items() if "lora_b" in name)


def test_22_other_data_are_given_a_loss_scale_of_their_own(
    fp16: Job, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A scale found for other data may be far too small, as is the scale of 1 that earlier versions saved."""
    alone(fp16, "--max_steps", "6", "--save_steps", "2")
    assert state(fp16, "epoch0-iter2")["loss_scale"] == 16384
    (tmp_path / "other.json").write_text(json.dumps([{"instruction": "count", "output": str(i)} for i in range(99)]))
    start, fp16.output = fp16.output / "epoch0-iter2", tmp_path / "other"
    capsys.readouterr()
    more = ("--data_config", str(tmp_path / "other.json"), "--allow_changed", "data", "--max_steps", "3")
    with pytest.raises(NotFiniteError, match=r"All 3 steps .* The loss scale, 32768 by now, .*: give more --max_steps"):
        alone(fp16, "--resume", str(start), *more)
    assert re.findall(r"Step (\d+): .* loss scale of (\d+)", capsys.readouterr().out)[0] == ("3", "65536")


@pytest.mark.parametrize("layout", [(), ("--model_parallel_size", "2")], ids=["data", "tensors"])
def test_22_fp16_that_overflows_at_any_scale_ends_the_run(fp16: Job, tmp_path: Path, layout: tuple[str, ...]) -> None:
    """At the smallest scale, on both ranks after the same step, with status 5 and the flag that helps."""
    fp16.base, fp16.ranks = rescaled(tmp_path, 1e5, head=1e3), 2
    more = ("--precision", "fp16", "--epochs", "9", "--batch_size", "1", "--accum_iter", "1", "--max_steps", "40")
    done = fp16.run(*more, *layout)
    found = re.search(
        r"NotFiniteError: Step 17: the loss is [\d.]+, the gradient norm (nan|inf) at a loss scale of 1\.", said(done)
    )
    assert found, done.stderr[-3000:]
    assert "16 steps before it were skipped. Look at the documents, give --precision bf16 or fp32" in said(done)
    assert (fp16.status["state"], fp16.status["status"], fp16.status["reason"]) == ("failed", 5, "NotFiniteError")
    assert not any(load_file(file)[name].any() for file in fp16.output.glob("*/trainable.safetensors")
                   for name in load_file(file) if "lora_b" in name)  # fmt: skip


def test_22_a_dry_run_in_fp16_takes_a_true_step(fp16: Job, capsys: pytest.CaptureFixture) -> None:
    """It first halves the scale as often as it takes."""
    alone(fp16, "--dry_run")
    out = capsys.readouterr().out
    norms = re.findall(r"grad norm +(\S+)", out)
    assert f"step      {len(norms)}/{len(norms)} 100.0%" in out and "dry run: all is well, nothing was written" in out
    assert len(norms) > 2 and not any(norm[0].isdigit() for norm in norms[:-1]) and norms[-1][0].isdigit()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_22_a_run_of_skipped_steps_is_no_finished_one(fp16: Job, precision: str) -> None:
    """In any precision; no checkpoint of a finished run is left."""
    weights = load_file(fp16.base / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, fp16.base / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotFiniteError, match=r"All 3 steps of the run were skipped: nothing was learned\. Look at"):
        alone(fp16, "--max_steps", "3", "--not_finite", "skip", precision=precision)
    assert (fp16.status["state"], fp16.status["status"]) == ("failed", 5)
    assert not list(fp16.output.glob("epoch*"))


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
