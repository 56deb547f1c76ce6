"""`--deterministic`, without a GPU: what is set and said, and that no step needs an operation that then raises."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from accessory import finetuning, kernels
from accessory.config import FinetuneConfig
from accessory.errors import ConfigError
from accessory.kernels import fused_attention
from accessory.kernels.fused_attention import Fused
from accessory.parallel import groups
from accessory.parallel.groups import Layout
from accessory.run.determinism import algorithms_as_before, fix_order_of_sums, set_cublas_workspace
from accessory.run.identity import FinetuneJob
from tests.conftest import DATA

WORKER = Path(__file__).with_name("cuda_operations_worker.py")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
RAISE_ON_CUDA = {
    "_cumsum", "cumsum", "cumsum_", "bincount", "histc", "kthvalue", "median", "nanmedian", "put", "put_",
    "nll_loss_forward", "nll_loss2d_forward", "scatter_reduce", "_ctc_loss_backward", "_embedding_bag_backward",
    "avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "max_unpool2d",
    "adaptive_max_pool2d_backward", "grid_sampler_2d_backward", "upsample_linear1d_backward",
    "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "reflection_pad1d_backward",
}  # fmt: skip
"""As torch.use_deterministic_algorithms documents, in aten's names; some with some arguments only."""


def test_on_cuda_sums_have_an_order() -> None:
    """Flash's gradient asks for this flag, and gets it only if it does not just warn; memory is not filled for it."""
    with algorithms_as_before():
        (said,) = fix_order_of_sums(True, CUDA)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert said.startswith("--deterministic: equal runs get equal bits")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_what_does_not_hold_is_said() -> None:
    """On CUDA without the flag; on a CPU the flag changes nothing."""
    assert fix_order_of_sums(False, CUDA) == [
        "equal runs may differ in their last digits here, and so may a resumed one: see --deterministic"
    ]
    assert fix_order_of_sums(True, CPU) == ["--deterministic changes nothing here: a CPU sums in one order anyway"]
    assert fix_order_of_sums(False, CPU) == []
    assert not torch.are_deterministic_algorithms_enabled()


def test_cublas_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user chose stays, if it will do."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    set_cublas_workspace()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_cublas_workspace()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG is ':0:0', .* expected :4096:8 or :16:8"):
        set_cublas_workspace()


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_before_cuda_starts(device: str, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group starts CUDA; a run on a CPU leaves the environment as it is."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    seen: list[str | None] = []

    def start(*_given: object) -> None:
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        raise KeyboardInterrupt

    monkeypatch.setattr(groups, "start", start)
    config = FinetuneConfig(pretrained_path=[tiny_base], data_config=DATA, device=device, deterministic=True)
    with pytest.raises(KeyboardInterrupt):
        finetuning.finetune(config)
    assert seen == [None if device == "cpu" else ":4096:8"]


def test_a_run_resumed_with_another_value_is_told(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is among what must be equal for equal bits; on a CPU it changes none."""
    monkeypatch.setattr(kernels, "computing", lambda *_given: "triton")

    def condition(device: torch.device, deterministic: bool) -> bool | None:
        config = FinetuneConfig(pretrained_path=[tiny_base], data_config=DATA, deterministic=deterministic)
        job = FinetuneJob(config, Layout(device=device), [], SimpleNamespace(dtype=torch.bfloat16), None, None)
        return job.conditions["deterministic"]

    assert [condition(CUDA, wanted) for wanted in (False, True)] == [False, True]
    assert [condition(CPU, wanted) for wanted in (False, True)] == [None, None]


def test_no_step_needs_an_operation_that_raises(python) -> None:
    """The engine's step, by family and method, on a pretended GPU, without Triton's kernels, which raise nothing."""
    done = python(WORKER)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 8 + 4 * 2
    for step, operations in found.items():
        assert not RAISE_ON_CUDA.intersection(operations), step
        assert {"mm", "_flash_attention_forward"}.issubset(operations), step


def test_flash_needs_more_memory_for_it() -> None:
    """A sum of q's gradient for each of the processors that share a head, in fp32: an H200 has 132 for 32 heads."""
    fused, sizes = Fused("flash", torch.bfloat16, 128), ((4096,), 32, 8, CUDA)
    before = fused_attention.backward_bytes(fused, *sizes)
    with algorithms_as_before():
        fix_order_of_sums(True, CUDA)
        more = fused_attention.backward_bytes(fused, *sizes) - before
    assert more == (5 - 1) * (4096 + 128) * 32 * 128 * 4
