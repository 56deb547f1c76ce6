"""Which device a process takes, on machines that are made up."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from accessory.errors import ParallelError
from accessory.parallel import device
from accessory.parallel.device import check_own_device, choose_device, why_no_gpu

KERNEL_MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Jan  1 00:00:00 UTC 2025\nGCC version: 13\n"
OPEN_MODULE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build\n"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Makes one: how many GPUs PyTorch sees, driver, device files, CUDA's versions, of PyTorch and of the driver."""

    def make(gpus=0, driver=None, files=0, built="13.0", runs=None, warned=None, module=KERNEL_MODULE, maps=True):
        (tmp_path / "version").unlink(missing_ok=True)
        if driver:
            (tmp_path / "version").write_text(module.format(driver))
        for number in range(files):
            (tmp_path / f"nvidia{number}").touch()

        def is_available() -> bool:
            """With PyTorch's own warning."""
            if warned:
                warnings.warn(warned, stacklevel=1)
            return gpus > 0

        monkeypatch.setattr(device, "_DRIVER", tmp_path / "version")
        monkeypatch.setattr(device, "_DEVICES", tmp_path)
        monkeypatch.setattr(device, "_driver_cuda", lambda: runs)
        monkeypatch.setattr(device, "_maps_memory", lambda: maps)
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda place: None)
        for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            monkeypatch.setenv(name, "")  # so that it is put back in the end, even where it is not set now
            monkeypatch.delenv(name)

    return make


def test_each_rank_has_the_gpu_of_its_number(machine) -> None:
    machine(gpus=4)
    assert choose_device("auto", 2) == choose_device("cuda", 2) == choose_device("cuda:2", 0) == torch.device("cuda", 2)
    with pytest.raises(ParallelError, match="Local rank 4 has no GPU: 4 visible"):
        choose_device("cuda", 4)
    for wrong in ("tpu", "cuda:x", "auto:1", "cpu:1"):
        with pytest.raises(ParallelError, match="not one of auto, cpu, cuda"):
            choose_device(wrong, 0)


def test_the_only_gpu_that_is_shown_is_taken(machine) -> None:
    """As by `srun --gpus-per-task=1`; a number that the user gives is not changed."""
    machine(gpus=1)
    assert choose_device("auto", 3) == choose_device("cuda", 1) == torch.device("cuda", 0)
    with pytest.raises(ParallelError, match="Local rank 1 has no GPU"):
        choose_device("cuda:1", 0)


def test_two_ranks_on_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number, since each may call it cuda:0; the same one of another machine is another."""
    store, gpu = dist.HashStore(), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-a"))
    check_own_device(torch.device("cpu"), store, 0, 2)
    store.set("gpu-1", "elsewhere GPU-a")
    check_own_device(gpu, store, 0, 2)
    store.set("gpu-1", store.get("gpu-0"))
    with pytest.raises(ParallelError, match=r"Ranks 0 and 1 have the same GPU.*--gpus-per-task=1") as refused:
        check_own_device(gpu, store, 0, 2)
    assert refused.value.common


@pytest.mark.parametrize("module", [KERNEL_MODULE, OPEN_MODULE])
def test_a_driver_too_old_is_told_and_the_cpu_taken(machine, capsys, module: str) -> None:
    """Once a node; `--device cuda` is refused for it. PyTorch's own warning would be a second one."""
    machine(driver="535.104.05", files=2, built="13.0", runs=(12, 2), warned="the driver is too old", module=module)
    words = r"the NVIDIA driver \(535.104.05\) runs CUDA 12.2 and is too old for this PyTorch .*, built for CUDA 13.0: "
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_device("auto", 0) == choose_device("auto", 1) == torch.device("cpu")
    said = capsys.readouterr().err
    assert said.count("--device auto takes the CPU: the NVIDIA driver (535.104.05) runs CUDA 12.2") == 1
    assert "install driver 580.65 or later, or a PyTorch for CUDA 12" in said
    with pytest.raises(ParallelError, match=f"--device cuda: {words}"):
        choose_device("cuda", 0)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"driver": "580.1", "files": 1, "built": None}, r"\(580.1\), but this PyTorch .* was built without CUDA"),
        ({"driver": "580.1", "runs": (13, 0)}, "no /dev/nvidia0: start the container with --gpus all"),
        ({"files": 1, "runs": (13, 0), "warned": "CUDA unknown error"}, r"cannot start CUDA \(CUDA unknown error\)"),
        ({"driver": "525.60", "files": 1, "built": "12.8", "runs": (12, 0)}, "cannot start CUDA; look at nvidia-smi"),
    ],
)
def test_what_is_missing_is_said(machine, capsys, facts: dict, words: str) -> None:
    machine(**facts)
    with pytest.raises(ParallelError, match=words):
        choose_device("cuda", 0)
    choose_device("auto", 0)
    assert "warning: --device auto takes the CPU: there is an NVIDIA driver" in capsys.readouterr().err


def test_a_machine_without_gpus_and_one_that_hides_them_are_left_alone(machine, capsys, monkeypatch) -> None:
    machine()
    assert why_no_gpu() is None and choose_device("auto", 0) == torch.device("cpu")
    machine(driver="580.1", files=1, runs=(13, 0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("auto", 0) == choose_device("cpu", 0) == torch.device("cpu")
    assert capsys.readouterr().err == ""
    with pytest.raises(ParallelError, match="CUDA_VISIBLE_DEVICES is '', which hides all GPUs"):
        choose_device("cuda", 0)


def test_segments_grow_unless_the_user_has_settings(machine, monkeypatch) -> None:
    """Or they cannot: on a virtual GPU, or without CUDA."""
    for cannot in ({"maps": False}, {"built": None}):
        machine(gpus=1, **cannot)
        choose_device("cuda", 0)
        assert "PYTORCH_ALLOC_CONF" not in os.environ
    machine(gpus=1)
    choose_device("cpu", 0)
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    choose_device("cuda", 0)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        machine(gpus=1)
        monkeypatch.setenv(name, "max_split_size_mb:64")
        choose_device("cuda", 0)
        assert [os.environ.get(n) for n in device._ALLOCATOR].count("max_split_size_mb:64") == 1
        assert os.environ[name] == "max_split_size_mb:64" and "expandable_segments:True" not in os.environ.values()
