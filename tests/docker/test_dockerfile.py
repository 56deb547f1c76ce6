"""The image's steps work, run in a fresh virtual environment in the place of Docker, and so do its README's commands.

It installs everything anew (1.3 GB with PyTorch for CPUs, more for GPUs) and takes a minute or two.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKERFILE, IGNORED, README = (
    (ROOT / "docker" / name).read_text() for name in ("Dockerfile", "Dockerfile.dockerignore", "README.md")
)
TURNS = [{"from": "human", "value": "What is QST?"}, {"from": "gpt", "value": "Side tuning."}]
STEPS = re.findall(r"^([A-Z]+) (.+)$", DOCKERFILE, re.MULTILINE)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    """A directory that stands for the image: its venv, and the repository's files where COPY puts them. Removed."""
    made = tmp_path / "image"
    subprocess.run([sys.executable, "-m", "venv", made / "venv"], check=True)
    yield made
    shutil.rmtree(made)


def run(words: str, image: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """A shell command in the image's working directory."""
    variables = environment | {"PATH": f"{image / 'venv' / 'bin'}:/usr/bin:/bin"}
    variables.pop("PYTHONPATH", None)
    return subprocess.run(
        ["bash", "-c", words], cwd=image / "accessory", env=variables, capture_output=True, text=True, timeout=1500
    )


def left_out(folder: str, names: list[str]) -> set[str]:
    """What Docker leaves out of a folder: names after `**/` anywhere, others at the root alone."""
    lines = IGNORED.splitlines()
    at_root = lines if Path(folder) == ROOT else []
    return {name for name in names if name in at_root or f"**/{name}" in lines}


def test_steps_are_in_their_order() -> None:
    """What seldom changes comes first, so that an edit of the code does not install everything anew."""
    assert [kind for kind, _ in STEPS] == ["FROM", "RUN", "WORKDIR", "COPY", "RUN", "COPY", "ARG", "RUN", "CMD"]
    assert dict(STEPS)["WORKDIR"] == "/accessory"
    python = re.search(r"FROM python:(\d+)\.(\d+)", DOCKERFILE)
    assert (int(python[1]), int(python[2])) >= (3, 11)


def test_extras_are_installed_with_the_package_and_there_are_such() -> None:
    """The argument becomes pip's brackets; without it, what is there already is enough."""
    words = STEPS[-2][1].replace("pip install", "echo")
    for given, expected in (("", "."), ("vision,data", ".[vision,data]")):
        done = subprocess.run(["sh", "-c", words], env={"EXTRAS": given}, capture_output=True, text=True)
        assert done.stdout.split()[-1] == expected
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.search(r"EXTRAS=(\S+?)`", README)[1].split(",")) <= extras.keys()


@pytest.mark.timeout(1800)
def test_the_image_trains(image: Path, tiny_base: Path, clean_environment: dict[str, str]) -> None:
    """Every RUN but that of Debian's packages; then the two commands of docker/README.md, on a tiny model."""
    (image / "accessory").mkdir()
    for kind, words in STEPS:
        if words == ". .":
            shutil.copytree(ROOT, image / "accessory", ignore=left_out, symlinks=True, dirs_exist_ok=True)
        elif kind == "COPY":
            shutil.copy(ROOT / words.removesuffix(" ."), image / "accessory")
        elif kind == "RUN" and not words.startswith("apt-get"):
            done = run(words, image, clean_environment)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    local, remote = (line for line in README.splitlines() if line.startswith("docker run"))
    assert run("hf download --help", image, clean_environment).returncode == 0 and "hf download" in remote
    script = re.search(r"accessory bash (exps/\S+\.sh) /models/your-model-name$", local)[1]
    assert re.search(rf"&& bash {re.escape(script)} /models/NAME\"$", remote)
    (image / "data.json").write_text(json.dumps([{"conversations": TURNS}] * 16))
    flags = f"--data_config {image / 'data.json'} --max_steps 1"
    done = run(f"DEVICE=cpu bash {script} {tiny_base} {flags}", image, clean_environment)
    assert done.returncode == 0, done.stdout[:2000] + done.stderr[-2000:]
    assert list((image / "accessory" / "output" / "qst-70b").glob("epoch*/trainable.safetensors"))
