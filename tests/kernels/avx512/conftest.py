"""Tests of C++ kernels need a processor and a compiler for them; those of how they are found and compiled do not."""

from __future__ import annotations

import pytest
import torch

from tests import cpu_kernels

NEED_NO_KERNEL = ("test_available.py", "test_compiling.py")


@pytest.fixture(autouse=True)
def there(request: pytest.FixtureRequest) -> None:
    """Skipped or failed without them."""
    if request.path.name not in NEED_NO_KERNEL:
        cpu_kernels.require()


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest):
    """So many of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
