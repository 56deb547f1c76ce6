"""Runs that are cut in two end as those that are not. Numbers: docs/reliability.md."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accessory.checkpoint.manifest import MANIFEST_FILE, manifest_of, read_manifest
from accessory.config import FinetuneConfig, parse
from accessory.errors import CheckpointError, ConfigError
from accessory.finetuning import finetune
from tests.faults.job import ROOT, SIZE, Job, settings

LAST = "epoch0-iter12"


def alone(job: Job, *more: str) -> None:
    """Run the job in this process."""
    job.ranks = 1
    finetune(parse(FinetuneConfig, job.flags(*more)))


def another(job: Job, name: str) -> Job:
    """The same job in another directory."""
    return Job(job.base, job.method, job.output.with_name(name), job.environment, job.ranks)


def change(checkpoint: Path, file: str, **values: torch.Tensor | None) -> None:
    """Put other tensors into a file of a checkpoint, and make its manifest agree."""
    tensors = load_file(checkpoint / file) | values
    save_file({name: value for name, value in tensors.items() if value is not None}, checkpoint / file)
    was = read_manifest(checkpoint)
    (checkpoint / MANIFEST_FILE).unlink()
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest_of(checkpoint, was["step"], was["loss"])))


def test_01_two_halves_are_bitwise_the_whole(job: Job, twin: Job) -> None:
    """Two ranks, dropout, AdamW, cosine, two micro-batches a step: weights, moments, generators and losses."""
    assert job.run("--max_steps", "7").returncode == 0
    done = job.run("--resume", "latest")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming {job.output / 'epoch0-iter7'} after step 7\n" in done.stdout
    assert "not bit for bit" not in done.stdout
    assert job.digest(LAST) == twin.digest(LAST)
    assert job.losses == twin.losses and len(twin.losses) == 12


def test_02_another_random_state_is_another_run(job: Job) -> None:
    """So the first test can fail; and without a state there is no resuming."""
    alone(job, "--max_steps", "6", "--save_steps", "3")
    for name in ("same", "other", "none"):
        shutil.copytree(job.output / "epoch0-iter3", job.output.with_name(name))
    other = torch.Generator().manual_seed(7).get_state()
    change(job.output.with_name("other"), "training_state.safetensors", **{"generator.cpu.0": other})
    change(job.output.with_name("none"), "training_state.safetensors", **{"generator.cpu.0": None})
    digests = []
    for name in ("same", "other"):
        run = another(job, f"{name}-run")
        alone(run, "--max_steps", "6", "--resume", str(job.output.with_name(name)))
        digests.append(run.digest("epoch0-iter6"))
    assert digests[0] == job.digest("epoch0-iter6")
    assert all(digests[1][file] != digest for file, digest in digests[0].items())
    with pytest.raises(CheckpointError, match=r"generator\.cpu\.0 is missing; expected the generators of 1 ranks"):
        alone(another(job, "none-run"), "--resume", str(job.output.with_name("none")))


def test_03_from_any_place_in_an_epoch(job: Job) -> None:
    """From within an epoch, its edge, and the first step of the next. Saves asked for in mid-accumulation, after an odd
    number of micro-batches, are those of the step that ends next."""
    steps = ("--epochs", "3", "--max_steps", "22")
    alone(job, *steps, "--save_steps", "1")
    odd = another(job, "odd")
    alone(odd, *steps, "--accum_iter", "4", "--save_iteration_interval", "9", "--save_steps", "")
    assert [path.name for path in sorted(odd.output.glob("epoch0-iter*"))][:2] == ["epoch0-iter10", "epoch0-iter12"]
    for name, step in (("epoch0-iter18", 18), ("epoch0", 19), ("epoch1-iter1", 20)):
        run = another(job, name)
        alone(run, *steps, "--resume", str(job.output / name))
        assert run.digest("epoch1-iter3") == job.digest("epoch1-iter3"), name
        assert run.losses == {at: loss for at, loss in job.losses.items() if at > step}


def test_04_other_numbers_of_ranks(job: Job, no_dropout: Path) -> None:
    """2, then 1, then 4 ranks, on which the base lies in shards: the same documents in every step, so the same losses
    to rounding; and it is said."""
    job.method = no_dropout  # without dropout
    precise = ("--precision", "fp32", "--save_steps", "2", "--batch_size", "1")
    whole = another(job, "whole")
    whole.ranks = 1
    assert whole.run("--max_steps", "6", *precise, "--accum_iter", "8").returncode == 0
    job.ranks = 2
    assert job.run("--max_steps", "2", *precise, "--accum_iter", "4").returncode == 0
    for ranks, steps, was, layout in ((1, 4, 2, "sdp"), (4, 6, 1, "fsdp")):
        job.ranks = ranks
        flags = ("--resume", "latest", "--max_steps", str(steps), "--data_parallel", layout, *precise)
        done = job.run(*flags, "--accum_iter", str(8 // ranks))
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"not bit for bit: world_size was {was}, is {ranks}; " in done.stdout
    assert list(job.losses) == list(whole.losses) == [1, 2, 3, 4, 5, 6]
    for step, loss in whole.losses.items():
        assert job.losses[step] == pytest.approx(loss, rel=1e-5), step
    job.ranks = 1
    with pytest.raises(CheckpointError, match="global_batch was 8, is 3"):
        alone(job, "--resume", "latest", *precise, "--accum_iter", "3", "--precision", "fp32")


def test_05_other_sizes_of_tensor_parallelism(job: Job, no_dropout: Path, torchrun, python) -> None:
    """Cut over two ranks, put together, cut again: with a learning rate that changes nothing, every value is kept.

    Beside a base that is packed once and for all, logits of the first checkpoint on one rank are those of the last on
    two. (Packed as it streams in, each slice has second-level scales of its own.)
    """
    job.method = no_dropout
    still = ("--precision", "fp32", "--lr", "1e-30", "--min_lr", "0", "--allow_changed", "lr", "min_lr")
    tensors = ["--model_parallel_size", "2", "--batch_size", "4", "--accum_iter", "2"]
    assert job.run("--precision", "fp32", "--max_steps", "2", *tensors).returncode == 0
    alone(job, *still, "--max_steps", "3", "--resume", "latest", "--batch_size", "4", "--accum_iter", "2")
    job.ranks = 2
    done = job.run(*still, "--max_steps", "4", "--resume", "latest", *tensors)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second, third = (load_file(job.output / f"epoch0-iter{n}" / "trainable.safetensors") for n in (2, 3, 4))
    assert len(first) > 20
    for name, value in first.items():
        assert torch.equal(second[name], value) and torch.equal(third[name], value), name
    packed, worker, logits = job.output / "packed", Path(__file__).with_name("logits_worker.py"), []
    assert python(ROOT / "tools" / "quantize.py", job.base, packed).returncode == 0
    for run, last in ((partial(python, worker), "epoch0-iter2"), (partial(torchrun, 2, worker), "epoch0-iter4")):
        done = run(packed, job.output / last, job.output / "logits.safetensors")
        assert done.returncode == 0, done.stderr[-3000:]
        logits.append(load_file(job.output / "logits.safetensors")["logits"])
    assert logits[0].shape == (8, 512) and logits[0].std() > 0.1
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-6 * float(logits[0].abs().max()))


def test_05_a_template_that_prints_the_time(job: Job, tmp_path: Path, no_dropout: Path) -> None:
    """Every document holds the time. A resumed run keeps the time at which the first run began, and saves it again."""
    base = shutil.copytree(job.base, tmp_path / "timed")
    (base / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y, %H:%M:%S') }}\n{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    data = tmp_path / "data.yaml"
    data.write_text(f"META: [{{path: {ROOT / 'data_example' / 'accessory_qa.json'}, prompt_type: chat}}]")
    job.base, job.method, settings = base, no_dropout, ("--data_config", str(data), "--max_words", "256")
    alone(job, *settings, "--max_steps", "3", "--save_steps", "1")
    began = json.loads((job.output / "epoch0-iter1" / "run.json").read_text())["started"]
    while datetime.now().astimezone().isoformat(timespec="seconds") == began:
        time.sleep(0.05)
    part = job.output / "epoch0-iter1"
    for name in ("second", "third"):
        run = another(job, name)
        alone(run, *settings, "--max_steps", "3", "--save_steps", "1", "--resume", str(part))
        assert run.digest("epoch0-iter3") == job.digest("epoch0-iter3")
        part = run.output / "epoch0-iter2"
        assert json.loads((run.output / "epoch0-iter3" / "run.json").read_text())["started"] == began


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch_size", "3"], "global_batch was 8, is 12"),
        (["--data_config", "DATA"], r"data\.META\[0\]\.content was '[0-9a-f]{32}', is '[0-9a-f]{32}'\. To"),
        (["--max_words", "150"], r"data\.max_words was 160, is 150\. To go on all the same: --allow_changed data"),
        (["--data_config", "YAML"], r"data\.META\[0\]\.prompt_type was 'alpaca', is 'none'\. To go on"),
        (["--llama_config", "METHOD"], rf"settings\.{SIZE} was 4, is 8\."),
        (["--pretrained_path", "BASE"], r"base\[0\] was '\w{16}', is '\w{16}'"),
        (["--seed", "1"], "seed was 0, is 1"),
        (["--lr", "0.02"], r"lr was 0\.01, is 0\.02; min_lr was .*: --allow_changed lr\."),
        (["--epochs", "4"], "epochs was 2, is 4"),
        (["--optim", "adamw8bit"], "optim was 'adamw', is 'adamw8bit'"),
        (["--quant_type", "fp4"], "quantization was 'nf4', is 'fp4'"),
        (["--seed", "1", "--lr", "0.02"], r"seed was 0, is 1; lr was 0\.01, is 0\.02"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_06_a_changed_run_is_refused(flags: list[str], words: str, saved: Job, tmp_path: Path) -> None:
    """Field by field, with the saved and the current value."""
    made = {"DATA": tmp_path / "data.json", "METHOD": tmp_path / "method.json", "BASE": tmp_path / "base"}
    made["YAML"] = tmp_path / "data.yaml"
    made["YAML"].write_text(f"META: [{{path: {ROOT / 'data_example' / 'accessory_qa.json'}, prompt_type: none}}]")
    made["DATA"].write_text(json.dumps([{"instruction": f"count to {i}", "output": str(i)} for i in range(99)]))
    made["METHOD"].write_text(settings(8, 0.2))
    shutil.copytree(saved.base, made["BASE"])
    (weights,) = made["BASE"].glob("*.safetensors")
    save_file({name: 2 * value for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    refusal, words = CheckpointError, f"belongs to another run: {words}"
    if "METHOD" in flags and SIZE == "r":  # the saved part itself says that it cannot be read so
        refusal, words = ConfigError, "epoch0-iter2: was trained with r 4, here it is 8"
    with pytest.raises(refusal, match=words):
        alone(saved, "--resume", "latest", *[str(made.get(flag, flag)) for flag in flags])


def test_06_what_is_allowed_may_change(saved: Job) -> None:
    """And how many threads tokenize is nobody's business."""
    more = ("--resume", "latest", "--max_steps", "3", "--num_workers", "1")
    alone(saved, *more, "--seed", "1", "--lr", "0.02", "--allow_changed", "seed", "lr")
    assert saved.status["state"] == "finished" and saved.status["began_after"] == [2]


def test_06_what_follows_from_what_is_allowed_may_change_too(saved: Job, capsys: pytest.CaptureFixture) -> None:
    """min_lr and warmup_epochs follow lr and epochs if they were not given; a given one that differs is refused."""
    run = replace(saved, output=saved.output.with_name("plain"))
    flags = [flag for flag in run.flags() if flag not in ("--warmup_epochs", "0.2")]
    finetune(parse(FinetuneConfig, [*flags, "--max_steps", "2"]))
    more = (
        "--resume",
        "latest",
        "--max_steps",
        "3",
        "--lr",
        "0.02",
        "--epochs",
        "3",
        "--allow_changed",
        "lr",
        "epochs",
    )
    with pytest.raises(
        CheckpointError, match=r"another run: min_lr was 0\.001, is 0\.0\. .*: --allow_changed lr min_lr epochs\."
    ):
        finetune(parse(FinetuneConfig, [*flags, *more, "--min_lr", "0"]))
    finetune(parse(FinetuneConfig, [*flags, *more]))
    assert "changed, as --allow_changed says: lr, min_lr, warmup_epochs, epochs" in capsys.readouterr().out
    assert run.status["state"] == "finished"


def test_06_a_dry_run_takes_one_step_from_there(saved: Job, capsys: pytest.CaptureFixture) -> None:
    """And writes nothing."""
    before = sorted(path.name for path in saved.output.iterdir())
    alone(saved, "--resume", "latest", "--dry_run")
    assert "step      3/3 100.0%" in capsys.readouterr().out
    assert sorted(path.name for path in saved.output.iterdir()) == before


@pytest.fixture
def saved(job: Job) -> Job:
    """After two steps in this process."""
    alone(job, "--max_steps", "2")
    return job
