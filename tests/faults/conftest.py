"""The job that faults strike, and its undisturbed twin."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.job import LLAMA_TYPE, Job


@pytest.fixture(scope="session")
def dropout_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LoRA or side network with dropout, so that random numbers matter."""
    path = tmp_path_factory.mktemp("dropout") / "settings.json"
    side = '{"r": 4, "side_heads": 2, "dropout": 0.2}'
    path.write_text(side if LLAMA_TYPE.endswith("_qst") else '{"lora_rank": 4, "lora_dropout": 0.2}')
    return path


@pytest.fixture
def job(tiny_base: Path, dropout_lora: Path, clean_environment: dict[str, str], tmp_path: Path) -> Job:
    """The job, not started."""
    return Job(tiny_base, dropout_lora, tmp_path / "run", clean_environment)


@pytest.fixture(scope="package")
def twin(
    tiny_base: Path, dropout_lora: Path, clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Job:
    """The job, run without a fault."""
    job = Job(tiny_base, dropout_lora, tmp_path_factory.mktemp("twin") / "run", clean_environment)
    done = job.run()
    assert done.returncode == 0, done.stderr[-3000:]
    return job


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a directory to where the test may damage it."""
    return lambda directory: shutil.copytree(directory, tmp_path / "copies" / directory.name)
