"""Whole runs: every layout trains the same model, saves what it trained, and goes on from what it saved.

Each method is run on each storage in one process, each storage on each layout (NormBiasLoRA beside it), and each method
on each layout (beside the storages of `runs.ACROSS`). `--every-cell` and `--write-tables` run all products of methods,
storages and layouts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accessory.config import FinetuneConfig, parse
from accessory.finetuning import finetune
from accessory.meta import MetaModel
from accessory.method import METHODS
from accessory.parallel import groups
from accessory.run.status import read_status
from tests.conftest import DATA
from tests.runs import JOBS, LAYOUTS, SETTINGS, SUPPORT, cells

WORKER = Path(__file__).with_name("finetune_worker.py")
STEPS = 4
pytestmark = pytest.mark.timeout(1200)  # the first test waits for all runs
CUT_ANEW, CUT_ANEW_NOISE = ("nf4", "fp4", "int8"), 1e-3  # measured: 2.1e-4
NOISE = 1e-3  # measured: 2e-5
OF_NOTHING, OF_NOTHING_NOISE = "attention.wk.bias", 1e-2  # measured: 3e-3; AdamW follows rounding errors there
INPUTS_ROUNDED, INPUTS_ROUNDED_NOISE = ("llm_int8",), 3e-3  # measured: 1.4e-3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each cell of the table, or for those that stand for all."""
    if "layout" in metafunc.fixturenames:
        metafunc.parametrize(("job", "layout"), cells(wants_every_cell(metafunc.config)))


def wants_every_cell(config: pytest.Config) -> bool:
    """A table is written from all its cells."""
    return config.getoption("--every-cell") or config.getoption("--write-tables")


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, torchrun, pytestconfig: pytest.Config) -> Path:
    """The jobs on their layouts, at the same global batch of 16 documents: `runs/JOB/LAYOUT/`."""
    root = tmp_path_factory.mktemp("runs")
    write_settings(root)
    for ranks in sorted({ranks for ranks, _ in LAYOUTS.values()}):
        those = [cell for cell in cells(wants_every_cell(pytestconfig)) if LAYOUTS[cell[1]][0] == ranks]
        flags = [flags_of(root / name / layout, tiny_base, root, name, layout) for name, layout in those]
        (root / "flags.json").write_text(json.dumps(flags))
        done = torchrun(ranks, WORKER, root / "flags.json", timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        whole = [root / name / layout for name, layout in those if layout in ("one", "tp2")]
        assert done.stdout.count("reloaded bit for bit") == sum(not fault_of(run) for run in whole) * ranks
    return root


def write_settings(root: Path) -> None:
    """A --llama_config for each method, and 52 records: an epoch is 3 steps of 16 and one of 4, without some ranks."""
    for method in METHODS:
        (root / f"{method}.json").write_text(json.dumps(SETTINGS.get(method, {})))
    (root / "data.json").write_text(json.dumps(json.loads(DATA.read_text())[:52]))


def fault_of(run: Path) -> str | None:
    """Why it was refused; None: it was not."""
    status = read_status(run)
    return status["message"] if status["state"] == "failed" else None


def flags_of(output: Path, base: Path, settings: Path, job: str, layout: str) -> list[str]:
    """Flags of one run with what `write_settings` left; the global batch is 16 whatever the layout."""
    ranks, extra = LAYOUTS[layout]
    data_parallel = ranks // (2 if "--model_parallel_size" in extra else 1)
    return [
        *("--pretrained_path", str(base), "--output_dir", str(output), "--device", "cpu", "--precision", "fp32"),
        *("--data_config", str(settings / "data.json"), "--max_words", "160", "--max_steps", str(STEPS)),
        *("--batch_size", str(8 // data_parallel), "--accum_iter", "2", "--warmup_epochs", "0.2", "--clip_grad", "1"),
        *("--epochs", "2", "--llama_config", str(settings / f"{JOBS[job].method}.json")),
        *JOBS[job].flags,
        *extra,
    ]


def losses(run: Path) -> torch.Tensor:
    """Loss of every step [steps], fp64."""
    return torch.tensor([json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()])


def trained(run: Path) -> dict[str, torch.Tensor]:
    """What the run saved last."""
    (last,) = run.glob("epoch*/")
    return load_file(next(iter([*last.glob("trainable*.safetensors"), *last.glob("model*.safetensors")])))


def test_every_layout_trains_as_one_process_or_is_refused(runs: Path, job: str, layout: str, say) -> None:
    """Refused means: before any weight is read (the worker sees to that), with the flag to change."""
    reference, run = runs / job / "one", runs / job / layout
    if fault := fault_of(run):
        assert set(re.findall(r"--(\w+)", fault)) & FinetuneConfig.model_fields.keys(), fault
        say(SUPPORT, job, f"`{layout}`", "refused")
        return
    assert len(losses(run)) == STEPS
    assert losses(run)[-1] < losses(run)[0]
    if JOBS[job].storage in INPUTS_ROUNDED:
        # Whether a number is rounded up or down may depend on its last bits, and a micro-batch has outliers of its own.
        torch.testing.assert_close(losses(run), losses(reference), rtol=INPUTS_ROUNDED_NOISE, atol=0)
    elif JOBS[job].storage in CUT_ANEW and layout.startswith("tp2"):
        # Scales of scales run over 256 blocks, int8's over a row: slices have others, so the same weights are rounded
        # anew.
        torch.testing.assert_close(losses(run), losses(reference), rtol=CUT_ANEW_NOISE, atol=0)
    else:
        torch.testing.assert_close(losses(run), losses(reference), rtol=1e-4, atol=0)
        expected, actual = trained(reference), trained(run)
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            error = (actual[name] - value).norm() / value.norm().clamp_min(1e-3)
            assert error < (OF_NOTHING_NOISE if name.endswith(OF_NOTHING) else NOISE), (name, error)
    say(SUPPORT, job, f"`{layout}`", "tested")


def test_trained_part_is_small_and_named_as_upstream(runs: Path) -> None:
    names = trained(runs / "llama_peft-nf4_single" / "one").keys()
    assert "layers.0.attention.wq.lora_a.weight" in names
    assert "layers.1.feed_forward.w2.bias" in names
    assert "norm.weight" in names
    assert not any(name.endswith(("wq.weight", "codes")) for name in names)


def test_checkpoint_directory_is_complete(runs: Path) -> None:
    (directory,) = (runs / "llama_peft-nf4_single" / "tp2").glob("epoch*/")
    present = {path.name for path in directory.iterdir()}
    expected = {"trainable.safetensors", "training_state.safetensors", "training_state.json"}
    assert expected | {"config.json", "meta.json", "run.json", "tokenizer.json"} <= present
    run = json.loads((directory / "run.json").read_text())
    assert run["quantization"] == "nf4_single"
    assert run["arguments"]["quant"] is True
    assert (runs / "llama_peft-nf4_single" / "tp2" / "loss.png").stat().st_size > 10_000
    assert list((runs / "llama_peft-nf4_single" / "tp2").glob("events.out.tfevents.*"))


def test_trainable_alone_finds_its_base(runs: Path, tiny_base: Path) -> None:
    """`MetaModel.from_pretrained(TRAINABLE)` equals (BASE, TRAINABLE, --quant), and differs from the base."""
    groups.start("cpu")
    (directory,) = (runs / "llama_peft-nf4_single" / "one").glob("epoch*/")
    tokens = torch.arange(40) % 500
    alone = MetaModel.from_pretrained(directory, dtype="fp32").logits(tokens, (30, 10))
    both = MetaModel.from_pretrained([tiny_base, directory], dtype="fp32", quant=True, quant_type="nf4_single")
    assert torch.equal(alone, both.logits(tokens, (30, 10)))
    base = MetaModel.from_pretrained(tiny_base, dtype="fp32").logits(tokens, (30, 10))
    assert (alone - base).abs().max() > 0.1


def test_resume_is_exact(tiny_base: Path, tmp_path: Path, torchrun) -> None:
    """On four ranks, 4 steps, and 2 + resume 2, give the same losses and weights with `==`, dropout included.

    Resuming in processes of its own, from damaged checkpoints, and on other numbers of ranks: tests/faults.
    """
    write_settings(tmp_path)
    settings = {
        "peft": {"lora_rank": 4, "lora_dropout": 0.2},
        "adapter": SETTINGS["adapter"],
        "qst": {"r": 4, "side_heads": 2, "dropout": 0.2},
    }

    def flags(method: str, name: str, *more: str) -> list[str]:
        (tmp_path / f"{method}.json").write_text(json.dumps(settings[method]))
        output = tmp_path / method / name
        return [*flags_of(output, tiny_base, tmp_path, f"llama_{method}-nf4", "tp2_fsdp2"), *more]

    parts = [("whole",), ("halves", "--max_steps", "2"), ("halves", "--resume", "latest")]
    (tmp_path / "flags.json").write_text(json.dumps([flags(method, *part) for method in settings for part in parts]))
    done = torchrun(4, WORKER, tmp_path / "flags.json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for root in (tmp_path / method for method in settings):
        assert f"resuming {root / 'halves' / 'epoch0-iter2'} after step 2\n" in done.stdout
        assert losses(root / "whole").tolist() == losses(root / "halves").tolist()
        whole = load_file(root / "whole" / "epoch0" / "trainable.safetensors")
        halves = load_file(root / "halves" / "epoch0" / "trainable.safetensors")
        assert all(torch.equal(value, halves[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("flags", "steps", "said"),
    [
        (
            [],
            "3, 1 an epoch, of 64 documents each",
            ["more --epochs or a smaller --accum_iter or a smaller --batch_size"],
        ),
        (["--batch_size", "1", "--accum_iter", "1"], "180, 60 an epoch, of 1 documents each", []),
        (["--max_steps", "2", "--warmup_epochs", "3"], "2, 1 an epoch", ["ends within its warm-up, at .* 6.67e-04"]),
        (["--epochs", "1", "--batch_size", "1"], "15, 15 an epoch, of 4 documents", ["15 steps may be too few"]),
    ],
    ids=["default", "many", "cut", "one epoch"],
)
def test_a_run_says_how_many_steps_it_has(
    flags: list[str], steps: str, said: list[str], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """60 records, README's command; what to change where they are few, or where the learning rate never gets up."""
    data = tmp_path / "data.json"
    data.write_text(json.dumps(json.loads(DATA.read_text())[:60]))
    common = ["--pretrained_path", str(tiny_base), "--llama_type", "llama_peft", "--data_config", str(data)]
    more = ["--quant", "--only_save_trainable", "--device", "cpu", "--max_words", "160", "--dry_run"]
    finetune(parse(FinetuneConfig, [*common, *more, *flags]))
    out = capsys.readouterr().out
    assert f"optimizer steps: {steps}" in out
    found = [line for line in out.splitlines() if "may be too few" in line or "its warm-up" in line]
    assert len(found) == len(said) and all(map(re.search, said, found)), found
    assert out.rstrip().splitlines()[-1] == "dry run: all is well, nothing was written"
