"""Tests of C++ kernels need a processor and a compiler for them; those of how they are found and compiled do not."""

from __future__ import annotations

import pytest
import torch

from accessory.kernels import avx512
from accessory.kernels.avx512.compiling import CannotCompile, compiled_library

NEED_NO_KERNEL = ("test_available.py", "test_compiling.py")


def can_run() -> bool:
    """Whether kernels compile for this processor: not whether they are right, or wrong ones would skip their tests."""
    if not avx512._processor_has_it():
        return False
    try:
        compiled_library()
    except CannotCompile:
        return False
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here."""
    if can_run():
        return
    for item in items:
        if item.path.parent.name == "avx512" and item.path.name not in NEED_NO_KERNEL:
            item.add_marker(pytest.mark.skip(reason="no AVX512-bf16, or no C++ compiler"))


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest):
    """So many of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
