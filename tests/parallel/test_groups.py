"""Ranks and devices from the environment."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers the backend "fake"

from accessory.errors import ParallelError
from accessory.parallel import groups

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")


END_PROCESS = groups.end_process  # which raises SystemExit while tests run


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


def test_after_a_failure_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's groups are left by all ranks together, or not at all: others may still be in a collective."""
    left = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append("groups"))
    monkeypatch.setattr(groups.fairscale_groups, "destroy_model_parallel", lambda: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(groups.atexit, "_run_exitfuncs", lambda: None)
    monkeypatch.setattr(groups.os, "_exit", sys.exit)
    for status, expected in ((1, []), (75, []), (0, ["groups"])):
        with pytest.raises(SystemExit) as ended:
            END_PROCESS(status)
        assert (ended.value.code, left) == (status, expected)


def test_host_and_gpu_have_backends_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of two backends sends objects, barriers and tensors of the host through gloo."""
    made = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: made.update(backend=backend))
    monkeypatch.setattr(groups, "check_own_device", lambda *_: None)
    groups._join(torch.device("cuda", 0), 0, 1, groups.COLLECTIVE_TIMEOUT)
    assert made["backend"] == "cpu:gloo,cuda:nccl"
    monkeypatch.undo()
    for name in groups._NCCL_SETTINGS:
        os.environ.pop(name, None)

    dist.init_process_group("cpu:gloo,cuda:fake", store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups.start("cpu")
        dist.barrier()
        dist.barrier(groups.data_parallel_group())
        for one in (None, groups.data_parallel_group(), groups.model_parallel_group()):
            found = [None]
            dist.all_gather_object(found, "word", one)
            dist.broadcast_object_list(found, 0, one)
            dist.all_reduce(torch.ones(1), group=one)
            assert found == ["word"]
    finally:
        groups.stop()


def test_what_nccl_is_told_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the environment when its group is made; what a user has set there stays. A CPU's groups need nothing."""
    seen = []
    names = ("TORCH_NCCL_RETHROW_CUDA_ERRORS", "TORCH_NCCL_DUMP_ON_TIMEOUT")
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: seen.append([os.environ.get(n) for n in names]))
    monkeypatch.setattr(groups, "check_own_device", lambda *_: None)
    monkeypatch.setattr(groups.os, "environ", dict(os.environ))
    for name in names:
        os.environ.pop(name, None)
    for device in ("cpu", "cuda"):
        groups._join(torch.device(device, 0), 0, 1, groups.COLLECTIVE_TIMEOUT)
    os.environ[names[1]] = "0"
    groups._join(torch.device("cuda", 0), 0, 1, groups.COLLECTIVE_TIMEOUT)
    assert seen == [[None, None], ["0", "1"], ["0", "0"]]


class ProcessGroupNCCL:
    """Remembers its time limits."""

    def __init__(self) -> None:
        self.limits: list[timedelta] = []

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self.limits.append(timeout)


class ProcessGroupGloo(ProcessGroupNCCL):
    """The same."""


def test_nccl_gives_up_after_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its watchdog would abort the process before ours has said which rank is lost; gloo's error is told as it is."""
    made = [{"cpu": ProcessGroupGloo(), "cuda": ProcessGroupNCCL()} for _ in range(3)]
    them = [SimpleNamespace(_device_types=list(one), _get_backend=one.get) for one in made]
    watch = SimpleNamespace(timeout=0.0, backends=[])
    monkeypatch.setattr(groups, "dist", SimpleNamespace(group=SimpleNamespace(WORLD=them[0])))
    monkeypatch.setattr(groups, "model_parallel_group", lambda: them[1])
    monkeypatch.setattr(groups, "data_parallel_group", lambda: them[2])
    monkeypatch.setattr(groups, "_watch", watch)

    def set_for_all(timeout: timedelta, group: SimpleNamespace) -> None:
        """As PyTorch does."""
        for device in group._device_types:
            group._get_backend(device)._set_default_timeout(timeout)

    monkeypatch.setattr(groups, "_set_pg_timeout", set_for_all)
    groups.limit_waiting(timedelta(seconds=90))
    for one in made:
        assert one["cpu"].limits == [timedelta(seconds=90)]
        assert one["cuda"].limits[-1] >= timedelta(seconds=90 + 60)
    assert watch.timeout == 90 and watch.backends == [backend for one in made for backend in one.values()]
    if dist.is_nccl_available():
        assert callable(dist.ProcessGroupNCCL._set_default_timeout)


def test_one_process_lays_all_groups() -> None:
    layout = groups.start("cpu")
    assert (layout.world_size, layout.mp_size, layout.dp_size, layout.is_main) == (1, 1, 1, True)
    groups.stop()
    groups.stop()


def test_faults_after_the_groups_were_left_are_each_ones_own() -> None:
    """Not an echo of the first one that the ranks agreed on."""
    groups.start("cpu")
    assert groups.root_cause(ParallelError("first")).prints
    groups.stop()
    found = [groups.root_cause(ParallelError(words)) for words in ("second", "third")]
    assert [(str(fault), fault.prints) for fault in found] == [("second", True), ("third", True)]


def test_a_backward_is_progress(watched: list[str]) -> None:
    """Of each module that it comes to; where nothing learns, it comes to none."""
    blocks = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    blocks[0].requires_grad_(False)
    for block in blocks:
        block.register_forward_hook(groups.tick_in_backward)
    y = blocks(torch.ones(1, 2))
    assert not watched
    y.sum().backward()
    assert watched == ["tick", "tick"] and blocks[1].weight.grad is not None
