"""The job that faults strike, and its undisturbed twin."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.job import Job, settings


@pytest.fixture(scope="session")
def dropout_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LoRA or side network with dropout, so that random numbers matter."""
    path = tmp_path_factory.mktemp("dropout") / "settings.json"
    path.write_text(settings(dropout=0.2))
    return path


@pytest.fixture(scope="session")
def no_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without it."""
    path = tmp_path_factory.mktemp("no_dropout") / "settings.json"
    path.write_text(settings())
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
