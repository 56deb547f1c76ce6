"""Triton decides when it is imported whether its interpreter runs the kernels, for the whole process.

So each file of this directory is one test to pytest, and all of them are run in one other Python with
TRITON_INTERPRET=1. To run some of a file: TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/test_gate.py -k relu
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DONE = pytest.StashKey[subprocess.CompletedProcess]()
"""The other Python, which the first file's turn has run."""


if INTERPRETED and find_spec("triton") is not None:
    from triton import language
    from triton.runtime import interpreter

    convert_otherwise = interpreter._convert_float

    def convert(values: np.ndarray, source: language.dtype, target: language.dtype, mode: object) -> np.ndarray:
        """A GPU rounds fp32 to bf16, the interpreter cuts it off. Here it rounds, so that results can be exact."""
        if (source, target) == (language.float32, language.bfloat16):
            return torch.from_numpy(np.array(values)).bfloat16().view(torch.uint16).numpy()
        return convert_otherwise(values, source, target, mode)

    interpreter._convert_float = convert
    dot_otherwise = interpreter.InterpreterBuilder.create_dot

    def dot(self: object, a: interpreter.TensorHandle, b: interpreter.TensorHandle, *rest: object) -> object:
        """It multiplies the bits of bf16 as whole numbers. Here they are fp32 first."""
        wide = [
            interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), language.float32)
            if t.dtype.scalar == language.bfloat16
            else t
            for t in (a, b)
        ]
        return dot_otherwise(self, *wide, *rest)

    interpreter.InterpreterBuilder.create_dot = dot


@pytest.fixture
def far(tmp_path: Path) -> Callable[[Tensor], Tensor]:
    """A bf16 copy of x [3, ...] whose last row is more than 2^31 numbers behind its first, in a file that is a hole."""

    def put(x: Tensor) -> Tensor:
        stride = (1 << 30) + 16
        path, numel = tmp_path / str(len(list(tmp_path.iterdir()))), 2 * stride + x[0].numel()
        hole = torch.from_file(str(path), shared=True, size=numel, dtype=torch.bfloat16)
        rows = hole.as_strided(x.shape, (stride, *x[0].contiguous().stride()))
        rows.copy_(x)
        return rows

    return put


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.File | None:
    """A file of this directory whole, unless this already is the Python where its tests can run."""
    if INTERPRETED or module_path.parent != Path(__file__).parent:
        return None
    return InterpretedFile.from_parent(parent, path=module_path)


class InterpretedFile(pytest.File):
    """A test file that the other Python collects."""

    def collect(self) -> Iterator[pytest.Item]:
        """The one test that it is here."""
        yield InInterpreter.from_parent(self, name="in_interpreter")


class InInterpreter(pytest.Item):
    """All tests of a file, under Triton's interpreter."""

    def runtest(self) -> None:
        """Fails with the other pytest's output; skipped, like every test in it would be, without Triton."""
        if find_spec("triton") is None:
            pytest.skip("Triton is not installed")
        if DONE not in self.session.stash:
            files = [str(item.path) for item in self.session.items if isinstance(item, InInterpreter)]
            self.session.stash[DONE] = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *files],
                cwd=self.config.rootpath,
                # Twins are plain PyTorch.
                env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "ACCESSORY_AVX512": "0"},
                capture_output=True,
                text=True,
            )
        done = self.session.stash[DONE]
        blamed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        if done.returncode and (not blamed or any(self.path.name in line for line in blamed)):
            pytest.fail(done.stdout + done.stderr, pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Where a failure is said to be."""
        return self.path, None, f"{self.path.name} in Triton's interpreter"
