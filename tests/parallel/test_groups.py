"""Ranks and devices from the environment."""

from __future__ import annotations

import pytest
import torch

from accessory.errors import ParallelError
from accessory.parallel import groups

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_alone_without_a_launcher() -> None:
    assert groups.launch_environment() == (0, 1, 0)


def test_torchrun_comes_before_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_PROCID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert groups.launch_environment() == (3, 4, 1)


def test_slurm_finds_its_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PROCID": "5",
        "NTASKS": "8",
        "LOCALID": "1",
        "LAUNCH_NODE_IPADDR": "10.0.0.1",
        "JOB_ID": "42",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert groups.launch_environment() == (5, 8, 1)
    import os

    assert os.environ["MASTER_ADDR"] == "10.0.0.1"
    assert os.environ["MASTER_PORT"] == "20042"


def test_one_slurm_task_is_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert groups.launch_environment() == (0, 1, 0)


def test_several_processes_need_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ParallelError, match="MASTER_ADDR, MASTER_PORT"):
        groups.launch_environment()


def test_devices() -> None:
    assert groups.choose_device("cpu", 0) == torch.device("cpu")
    with pytest.raises(ParallelError, match="not one of auto, cpu, cuda"):
        groups.choose_device("tpu", 0)
    if not torch.cuda.is_available():
        assert groups.choose_device("auto", 0) == torch.device("cpu")
        with pytest.raises(ParallelError, match="--device cpu"):
            groups.choose_device("cuda", 0)


def test_one_process_lays_all_groups() -> None:
    layout = groups.start("cpu")
    assert (layout.world_size, layout.mp_size, layout.dp_size, layout.is_main) == (1, 1, 1, True)
    groups.stop()
    groups.stop()
