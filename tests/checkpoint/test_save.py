"""Checkpoint directories: whole or not at all, readable by whom they should be, and equal when read back."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from accessory.checkpoint import save
from accessory.checkpoint.manifest import verify
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.save import CheckpointWriter, fresh_directory, write_json, write_tensors
from accessory.errors import CheckpointError, DiskFullError
from accessory.tokenizer import open_tokenizer

RUN = {"base": [], "quantization": None}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("only root may mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture
def writer(tiny_base: Path, tmp_path: Path) -> CheckpointWriter:
    """Writes trained parts into tmp_path/out."""
    documents = {"config.json": {"dim": 128}, "meta.json": {"llama_type": "llama_peft"}, "run.json": RUN}
    return CheckpointWriter(tmp_path / "out", "trainable", documents, open_tokenizer(tiny_base))


def files(directory: Path) -> dict[str, bytes]:
    """Everything in a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_checkpoint_is_complete_and_equal(writer: CheckpointWriter, tiny_base: Path, weights) -> None:
    """Weights, state, documents and tokenizer, and nothing beside them; our own reader gives the same tensors."""
    state = {"exp_avg.norm.weight": torch.rand(128), "generator.cpu.0": torch.get_rng_state()}
    path = writer.write("epoch0", iter(weights.items()), state, {"progress": {"epoch": 1}}, 30)
    assert path == writer.output_dir / "epoch0"
    assert sorted(p.name for p in path.iterdir()) == sorted([
        "trainable.safetensors", "training_state.safetensors", "training_state.json", "config.json", "meta.json",
        "run.json", "tokenizer.json", "tokenizer_config.json", "manifest.json",
    ])  # fmt: skip
    assert [p.name for p in path.parent.iterdir()] == ["epoch0"]
    assert verify(path) == 30
    source = open_source(path)
    assert source.tensors.keys() == weights.keys()
    assert all(torch.equal(source.tensors[name].read(), weight) for name, weight in weights.items())
    saved = load_file(path / "training_state.safetensors")
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)
    assert json.loads((path / "training_state.json").read_text()) == {"progress": {"epoch": 1}}
    assert json.loads((path / "run.json").read_text()) == RUN
    assert open_tokenizer(path).fingerprint == open_tokenizer(tiny_base).fingerprint


def test_full_disk_leaves_the_old_checkpoint(small_disk: Path, writer: CheckpointWriter) -> None:
    """What does not fit is not there, what was there still is, and no half is left beside it."""
    writer.output_dir = small_disk
    writer.write("epoch0", iter({"norm.weight": torch.ones(8)}.items()), {}, {}, 1)
    before = files(small_disk / "epoch0")
    drawn: list[str] = []

    def large() -> Iterator[tuple[str, Tensor]]:
        for name in ("a", "b"):
            drawn.append(name)
            yield name, torch.ones(1 << 18)

    for name in ("epoch0", "epoch1"):
        with pytest.raises(DiskFullError) as caught:
            writer.write(name, large(), {}, {}, 1)
        assert f"{small_disk / name}: the disk is full" in str(caught.value)
        assert "No space left on device" in str(caught.value) and "bytes are free" in str(caught.value)
    assert [path.name for path in small_disk.iterdir()] == ["epoch0"]
    assert files(small_disk / "epoch0") == before
    assert drawn == ["a", "b"] * 2  # the collective behind the iterator is finished even so


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_any_failure_leaves_nothing(tmp_path: Path, fault: type[BaseException]) -> None:
    """A failure that is not the disk's passes through unchanged."""
    with pytest.raises(fault), fresh_directory(tmp_path / "epoch0") as directory:
        write_json(directory / "a.json", {})
        raise fault
    assert list(tmp_path.iterdir()) == []


def test_directory_appears_only_when_whole(tmp_path: Path) -> None:
    """Until the end a reader sees the old one; then the new one alone, without files of the old."""
    target = tmp_path / "epoch0"
    for name in ("old", "new"):
        with fresh_directory(target) as directory:
            write_json(directory / f"{name}.json", {})
            assert [p.name for p in target.glob("*")] == (["old.json"] if name == "new" else [])
    assert [p.name for p in target.iterdir()] == ["new.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["epoch0"]


def test_leftovers_of_a_killed_run_are_no_hindrance(tmp_path: Path) -> None:
    """Hidden directories that nobody removed are written over."""
    for name in (".epoch0.partial", ".epoch0.former", "epoch0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale.json").touch()
    with fresh_directory(tmp_path / "epoch0") as directory:
        write_json(directory / "a.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["epoch0"]
    assert [p.name for p in (tmp_path / "epoch0").iterdir()] == ["a.json"]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    """An output directory that is a file is named."""
    (tmp_path / "out").touch()
    with (
        pytest.raises(CheckpointError, match=r"out/epoch0: cannot be written \(.*File exists: '.*/out'"),
        fresh_directory(tmp_path / "out" / "epoch0"),
    ):
        pass


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(writer: CheckpointWriter, mask: int) -> None:
    """Also of safetensors files, which their library makes private."""
    former = os.umask(mask)
    try:
        path = writer.write("epoch0", iter({"a": torch.ones(2)}.items()), {"b": torch.ones(2)}, {}, 1)
    finally:
        os.umask(former)
    assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {0o666 & ~mask}
    assert path.stat().st_mode & 0o777 == 0o777 & ~mask


def test_large_models_are_written_in_shards(tmp_path: Path, weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file above the limit (but for a tensor that is), all read back; a small model stays in one file."""
    monkeypatch.setattr(save, "SHARD_BYTES", 200_000)
    write_tensors(tmp_path, "model", iter(weights.items()))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) > 4
    assert names == [f"model-{i:05d}.safetensors" for i in range(len(names) - 1)] + ["model.safetensors"]
    largest = max(weight.nbytes for weight in weights.values())
    assert all(path.stat().st_size < max(200_000, largest) + 4096 for path in tmp_path.iterdir())
    source = open_source(tmp_path)
    assert source.tensors.keys() == weights.keys()
    assert all(torch.equal(source.tensors[name].read(), weight) for name, weight in weights.items())
    write_tensors(tmp_path, "trainable", iter({"norm.weight": torch.ones(8)}.items()))
    assert [path.name for path in tmp_path.glob("trainable*")] == ["trainable.safetensors"]


def test_two_ranks_write_the_whole_and_fail_together(torchrun, tiny_base: Path, tmp_path: Path) -> None:
    """Slices of two model-parallel ranks make the whole tensor; where the main one cannot write, both say so."""
    worker = Path(__file__).with_name("save_worker.py")
    done = torchrun(2, worker, tmp_path, tiny_base, PYTHONPATH=str(worker.parents[2]))
    assert done.returncode == 0, done.stderr[-3000:]
    saved = load_file(tmp_path / "epoch0" / "model.safetensors")
    assert sorted(saved) == ["columns", "rows", "whole"]
    assert all(torch.equal(value, torch.arange(48.0).view(6, 8)) for value in saved.values())
    for rank in range(2):
        assert f"{tmp_path / 'file' / 'epoch0'}: cannot be written" in (tmp_path / f"refused.{rank}").read_text()
