"""Later epochs are trained from what the base gave in the first: the same losses, whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from accessory.config import FinetuneConfig
from accessory.errors import CheckpointError, ConfigError, DiskFullError
from accessory.finetuning import finetune
from accessory.memory.row_file import IDENTITY_FILE, ROWS_FILE, WRITTEN_FILE
from accessory.model.block import Block
from accessory.run import lock as run_lock
from accessory.run.curves import read_losses
from accessory.run.lock import lock
from accessory.run.report import LOG_FILE
from tests.conftest import DATA, ROOT

WORKER = ROOT / "tests" / "finetune_worker.py"
EPOCHS = 3
TOKENS = 3065
"""Of all documents."""


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory):
    """Trains on the quickstart's records; returns the losses."""
    root = tmp_path_factory.mktemp("runs")
    data = root / "data.json"
    data.write_text(json.dumps(json.loads(DATA.read_text())[:24]))

    def given(name: str, qst: dict | None = None, **flags) -> dict:
        settings = root / f"{name}.json"
        settings.write_text(json.dumps({"r": 4, "side_heads": 2, **(qst or {})}))
        return {
            "pretrained_path": [tiny_base], "data_config": data, "llama_type": "llama_qst", "quant": True,
            "only_save_trainable": True, "device": "cpu", "epochs": EPOCHS, "batch_size": 4, "accum_iter": 2,
            "lr": 1e-2, "warmup_epochs": 0, "max_words": 128, "output_dir": root / name, "llama_config": [settings],
            **flags,
        }  # fmt: skip

    def train(name: str, qst: dict | None = None, **flags) -> list[float]:
        finetune(FinetuneConfig(**given(name, qst, **flags)))
        return losses(name)

    def losses(name: str) -> list[float]:
        return list(read_losses(root / name / LOG_FILE).values())

    def words(name: str, **flags) -> list[str]:
        found = given(name, **flags).items()
        return [word for flag, value in found for word in (f"--{flag}", *_words(value))]

    train.losses, train.flags = losses, words
    train.root = root
    return train


def _words(value: object) -> list[str]:
    return [] if value is True else [str(part) for part in (value if isinstance(value, list) else [value])]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Widths of all blocks that are run, apart from the plan's few tokens."""
    found, forward = [], Block.forward

    def counted(block: Block, x: torch.Tensor, *rest) -> torch.Tensor:
        found.extend(x.shape[1:] if len(x) > 4 else ())
        return forward(block, x, *rest)

    monkeypatch.setattr(Block, "forward", counted)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("qst", "base_blocks"),
    [({}, 2), ({"downsample": "avgpool"}, 2), ({"side_layers": 2, "downsample": "maxpool"}, 2), ({"tail": 1}, 1),
     ({"dropout": 0.1}, 2), ({"tail": 1, "side_layers": 0}, 1)],
    ids=str,
)  # fmt: skip
def test_losses_are_those_without_it(run, calls: list[int], qst: dict, base_blocks: int) -> None:
    """To the bit, in three epochs; frozen blocks run in the first only. Rows that only a pool reads are pooled."""
    name = "-".join(map(str, qst.items()))
    plain = run(f"plain{name}", qst)
    wide = calls.count(128)
    calls.clear()
    assert run(f"cached{name}", qst, cache_base=run.root / f"cache{name}") == plain
    widths = {"avgpool": 32 + 128, "maxpool": 128}.get(qst.get("downsample"), 256 // (1 + ("tail" in qst)))
    assert (run.root / f"cache{name}" / ROWS_FILE).stat().st_size == TOKENS * widths * 2
    frozen = wide * base_blocks // 2
    assert calls.count(128) == wide - frozen * (EPOCHS - 1) // EPOCHS


@pytest.mark.slow
def test_a_whole_cache_serves_other_batches(run, calls: list[int]) -> None:
    """Of another size, in another order; the base is not run once. Other side networks may use it too."""
    for name, more in (("eights", {"batch_size": 8, "accum_iter": 1}), ("threes", {"batch_size": 3, "seed": 5})):
        plain = run(f"plain-{name}", **more)
        run("whole", cache_base=run.root / "whole-cache", epochs=1, overwrite=True)
        calls.clear()
        assert run(f"again-{name}", cache_base=run.root / "whole-cache", **more) == plain
        assert 128 not in calls
    run("r8", {"r": 2, "gate": "scalar"}, cache_base=run.root / "whole-cache", epochs=1)


@pytest.mark.slow
def test_rows_in_eight_bits(run) -> None:
    """Half the bytes of all states but the last, which stays exact as the base does; losses within 0.5 %."""
    plain = torch.tensor(run("plain-for-8", {"downsample": "linear"}))
    flags = {"cache_base": run.root / "eight", "cache_base_rows": "int8"}
    eight = torch.tensor(run("eight-bits", {"downsample": "linear"}, **flags))
    assert eight[0] == plain[0] and not torch.equal(eight, plain)
    assert ((eight - plain) / plain).abs().max() < 5e-3
    assert (run.root / "eight" / ROWS_FILE).stat().st_size == TOKENS * (128 + 2 * 128 // 64 + 2 * 128)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["exact", "int8"])
def test_cut_in_the_second_epoch_it_goes_on_bit_for_bit(run, rows: str) -> None:
    flags = {"cache_base_rows": rows, "save_steps": 1}
    whole = run(f"whole-{rows}", cache_base=run.root / f"one-{rows}", **flags)
    run(f"cut-{rows}", cache_base=run.root / f"two-{rows}", max_steps=4, **flags)
    assert run(f"cut-{rows}", cache_base=run.root / f"two-{rows}", resume="latest", **flags) == whole
    last = [
        (run.root / name / "epoch2" / "trainable.safetensors").read_bytes() for name in ("whole-exact", "cut-exact")
    ]
    assert last[0] == last[1]


KILLED = """
import os, signal, sys
from accessory.config import FinetuneConfig, parse
from accessory.finetuning import finetune
from accessory.memory import row_file
count, work = [0], getattr(row_file.{owner}, "{name}")
def last(*given):
    count[0] += 1
    if count[0] == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(*given)
setattr(row_file.{owner}, "{name}", last)
finetune(parse(FinetuneConfig, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("owner", "name", "number", "there", "rows"),
    [("RowFile", "write", 23, 8, "exact"), ("os", "fdatasync", 3, 8, "exact"), ("os", "fdatasync", 4, 16, "int8")],
)  # fmt: skip
def test_killed_while_writing_it_goes_on_bit_for_bit(run, python, owner, name, number, there, rows) -> None:
    """Among the rows of the second step, before they are on the disk, and before the word that they are."""
    label = f"{name}-{number}"
    how = {"cache_base_rows": rows, "save_steps": 1}
    whole = run(f"whole-{label}", cache_base=run.root / f"whole-{label}-cache", **how)
    flags = run.flags(label, cache_base=run.root / f"{label}-cache", **how)
    done = python("-c", KILLED.format(owner=owner, name=name, number=number), *flags)
    assert done.returncode == -9, done.stderr[-2000:]
    assert (run.root / f"{label}-cache" / WRITTEN_FILE).read_bytes().count(1) == there
    assert run(label, cache_base=run.root / f"{label}-cache", resume="latest", **how) == whole


def test_another_base_or_other_data_are_refused(run) -> None:
    """Each difference is named, before any weight is read."""
    run("first", cache_base=run.root / "mine", epochs=1)
    with pytest.raises(
        ConfigError,
        match=r"--cache_base .*mine: holds .*: data.max_words was 128, is 120; precision was 'bf16', is 'fp32'\. Give",
    ):
        run("other", cache_base=run.root / "mine", max_words=120, precision="fp32")
    with pytest.raises(ConfigError, match=r"states was '2, of blocks 0 to 1, 128 wide', is '1, of blocks 1 to 1, "):
        run("fewer", {"side_layers": 2}, cache_base=run.root / "mine")
    with pytest.raises(ConfigError, match=r"rows was 'exact', is 'int8'"):
        run("eight", cache_base=run.root / "mine", cache_base_rows="int8")
    with (run.root / "mine" / ROWS_FILE).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"rows: is damaged; expected 1,569,280 bytes. Remove .*mine"):
        run("damaged", cache_base=run.root / "mine")
    assert IDENTITY_FILE in {path.name for path in (run.root / "mine").iterdir()}


def test_methods_that_change_the_states_are_refused(run) -> None:
    with pytest.raises(
        ConfigError, match=r"with --llama_type llama_peft gradients go .*goes with --llama_type \.\.\._qst"
    ):
        run("lora", cache_base=run.root / "cache", llama_type="llama_peft", llama_config=[])
    with pytest.raises(ConfigError, match="gradients go through all of the base's 2 blocks"):
        run("tail", {"tail": 2, "side_layers": 0}, cache_base=run.root / "cache")


def test_a_full_disk(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is refused before weights are read, and named where it fills up on the way."""
    usage = shutil.disk_usage(run.root)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
        with pytest.raises(
            DiskFullError, match=r"the base's states take 1,569,280 bytes, 1,000,000 are free. Free some"
        ):
            run("full", cache_base=run.root / "no-room")
    assert not (run.root / "no-room").exists()

    def full(*given) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskFullError, match=r"filled/rows: the disk is full, or a limit on it is reached"):
        run("filling", cache_base=run.root / "filled")


@pytest.mark.slow
def test_one_run_at_a_time_writes(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until all documents are there; then several may read."""
    monkeypatch.setattr(run_lock, "_PATIENCE", 0.1)
    directory = run.root / "locked"
    directory.mkdir()
    with lock(directory), pytest.raises(ConfigError, match=r"--cache_base .*locked: a run is at work there: process"):
        run("second", cache_base=directory)
    run("third", cache_base=directory, epochs=1)
    with lock(directory):
        run("fourth", cache_base=directory, epochs=1)


def test_a_dry_run_writes_nothing(run) -> None:
    with pytest.raises(FileNotFoundError):
        run("dry", cache_base=run.root / "dry-cache", dry_run=True)
    assert not (run.root / "dry-cache").exists()


def test_ranks_share_it(run, torchrun) -> None:
    """Two processes write different documents and read each other's; the model cut in two, one of them writes."""
    layouts = {"sdp": {"batch_size": 2}, "fsdp": {"batch_size": 2, "data_parallel": "fsdp"},
               "tp": {"model_parallel_size": 2}}  # fmt: skip
    flags = [
        run.flags(f"{name}-{kind}", save_interval=EPOCHS, **more, **cache)
        for name, more in layouts.items()
        for kind, cache in (("plain", {}), ("cached", {"cache_base": run.root / f"{name}-cache"}))
    ]
    (run.root / "flags.json").write_text(json.dumps(flags))
    done = torchrun(2, WORKER, run.root / "flags.json")
    assert done.returncode == 0, done.stderr[-3000:]
    for name in layouts:
        assert run.losses(f"{name}-cached") == run.losses(f"{name}-plain"), name
        assert (run.root / f"{name}-cache" / WRITTEN_FILE).read_bytes() == b"\1" * 24
