"""One save: it checks for room, reads back what it wrote, removes older checkpoints, and reports all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from accessory.checkpoint.manifest import MANIFEST_FILE, read_manifest, verify
from accessory.checkpoint.save import CheckpointWriter
from accessory.checkpoint.training_state import Progress, find_resumption
from accessory.errors import DiskFullError
from accessory.optim import build_optimizer
from accessory.parallel import groups
from accessory.parallel.parameters import NamedParameters
from accessory.parallel.tensor import WHOLE, Slicing
from accessory.run.report import Reporter
from accessory.run.saving import Saver
from accessory.run.status import RunStatus, read_status
from accessory.tokenizer import open_tokenizer

SLICINGS = {"wq.weight": Slicing(dim=0), "norm.weight": WHOLE, "frozen": WHOLE}
PROGRESS = Progress(epoch=1, step=2, total_steps=7)
CONDITIONS = {"world_size": 1, "mp_size": 1}


@pytest.fixture(scope="module", autouse=True)
def layout() -> Iterator[groups.Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()


@pytest.fixture
def saver(layout: groups.Layout, tiny_base: Path, tmp_path: Path) -> Callable[..., Saver]:
    """(kind of optimizer, ranks of the model, this rank, keep_last) -> what saves 3 weights, 2 of them trained."""

    def make(optim: str = "adamw", ranks: int = 1, rank: int = 0, keep_last: int | None = None) -> Saver:
        torch.manual_seed(0)
        shapes = {"wq.weight": (64, 100), "norm.weight": (6,), "frozen": (3, 5)}
        weights = NamedParameters({n: nn.Parameter(torch.randn(shape)) for n, shape in shapes.items()}, SLICINGS)
        trained = weights.only({"wq.weight", "norm.weight"})
        optimizer = build_optimizer("adamw", trained, 0.1, 0.1)
        for parameter in trained.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        where, out = replace(layout, mp_size=ranks, rank=rank), tmp_path / "out"
        out.mkdir(exist_ok=True)
        return Saver(
            CheckpointWriter(out, "trainable", {"meta.json": {}}, open_tokenizer(tiny_base)), weights, trained,
            optimizer, {"optim": optim, "seed": 3}, CONDITIONS, where, Reporter(None, 9, 0, where.is_main),
            RunStatus(out, 1, where.is_main), keep_last,
        )  # fmt: skip

    return make


def test_a_save_is_watched_over(saver, watched: list[str]) -> None:
    """A rank that hangs in it is noticed; each tensor that is gathered is progress."""
    saver()(PROGRESS)
    assert (watched[0], watched[-1], set(watched[1:-1])) == ("in", "out", {"tick"})
    assert len(watched) == 2 + 3 + 2 * 2  # weights, and two moments of two of them


def test_what_is_saved_can_be_gone_on_from(saver, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, moments, where the run stands, what it is; its size and time are told, its name kept in the status."""
    one = saver()
    one.losses += [0.25, 0.75]
    one(PROGRESS)
    assert not one.losses
    path = one.writer.output_dir / "epoch1-iter2"
    assert verify(path) == 7 and read_manifest(path)["loss"] == 0.5
    found = load_file(path / "trainable.safetensors")
    assert found.keys() == one.weights.keys() and all(torch.equal(found[n], p) for n, p in one.weights.items())
    state = load_file(path / "training_state.safetensors")
    for name, parameter in one.trained.items():
        assert torch.equal(state[f"exp_avg.{name}"], one.optimizer.state[parameter]["exp_avg"])
    assert find_resumption(path, one.identity, CONDITIONS).progress == PROGRESS
    said = re.search(r"saved (\S+) \(([\d.]+) MB in (\d+\.\d\d) s\)\n", capsys.readouterr().out)
    size = sum(file.stat().st_size for file in path.iterdir() if file.name != MANIFEST_FILE)
    assert (said[1], said[2]) == (str(path), f"{size / 1e6:.1f}") and float(said[3]) < 60
    status = read_status(one.writer.output_dir)
    assert (status["step"], status["checkpoint"]) == (7, "epoch1-iter2")


def test_only_the_main_rank_tells_and_removes(saver, capsys: pytest.CaptureFixture[str]) -> None:
    one = saver(rank=1, keep_last=1)
    for n in range(2):
        one(Progress(n + 1, 0, n + 1))
    assert not capsys.readouterr().out and len(list(one.writer.output_dir.glob("epoch*"))) == 2


def test_room_is_for_weights_moments_and_more(saver) -> None:
    """Each rank's slices; two moments of fp32, or codes and a scale for each block of 256, of what is trained."""
    beside = 16 << 20
    assert saver().needed == 4 * (6400 + 6 + 15) + 8 * (6400 + 6) + beside
    assert saver(ranks=2).needed == 4 * (2 * 6400 + 6 + 15) + 2 * 8 * (6400 + 6) + beside
    assert saver("adamw8bit").needed == 4 * (6400 + 6 + 15) + 2 * (6400 + 4 * 25) + 8 * 6 + beside


def test_without_room_nothing_is_begun(saver) -> None:
    """Earlier checkpoints stay."""
    one = saver()
    one(Progress(1, 0, 4))
    one.needed = 10**18
    with pytest.raises(DiskFullError, match="a checkpoint needs 1,000,000,000,000,000,000 bytes"):
        one(PROGRESS)
    assert [path.name for path in one.writer.output_dir.glob("epoch*")] == ["epoch0"]


def test_older_ones_go_where_that_is_wanted(saver, capsys: pytest.CaptureFixture[str]) -> None:
    """One that cannot be removed is reported, and the save still succeeds."""
    for keep_last, left in ((None, ["epoch0", "epoch1", "epoch2"]), (2, ["epoch1", "epoch2"])):
        one = saver(keep_last=keep_last)
        for n in range(3):
            one(Progress(n + 1, 0, n + 1))
        assert sorted(path.name for path in one.writer.output_dir.glob("epoch*")) == left
    (one.writer.output_dir / ".epoch1.removed").touch()
    one(Progress(4, 0, 4))
    assert f"{one.writer.output_dir / 'epoch1'}: could not be removed (Not a directory)" in capsys.readouterr().out
    assert json.loads((one.writer.output_dir / "epoch1" / MANIFEST_FILE).read_text())["step"] == 2
