"""docs/extending.md adds what it says: each section's blocks to a copy of the code, which then trains with it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_python

PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = {
    "family": "A family",
    "side": "A method",
    "recall": "An addition to attention",
    "prompt_tuning": "Embeddings among the tokens",
    "patches": "An image encoder",
    "two_choices": "An evaluation task",
}
"""Function of extending_worker.py -> the section it is for."""
MOST_FILES = 3


def section(title: str) -> str:
    """Its text."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]


def added(title: str, tree: Path, *how: str) -> list[str]:
    """Put a section's blocks into `tree`; returns the files they make or change. how: options of git apply."""
    files = []
    for name, text in re.findall(r"```python\n# (\S+)\n(.*?)```", section(title), re.DOTALL):
        assert not (tree / name).exists(), name
        (tree / name).write_text(text)
        files.append(name)
    for diff in re.findall(r"```diff\n(.*?)```", section(title), re.DOTALL):
        done = subprocess.run(["git", "apply", *how, "-"], input=diff, cwd=tree, text=True, capture_output=True)
        assert done.returncode == 0, f"{title}: {done.stderr}"
        files += re.findall(r"^\+\+\+ b/(.*)", diff, re.MULTILINE)
    return files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the code."""
    shutil.copytree(ROOT / "accessory", tmp_path / "tree/accessory", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "tree"


def test_storage_is_a_file_and_a_line(tree: Path) -> None:
    """Without them nobody knows of it, and with them all is as it was; tests/quant/test_nf4_scales.py uses it."""
    title, file = "A storage", "accessory/quant/nf4_scales.py"
    assert f"](../{file})" in section(title)
    (tree / file).unlink()
    files = [file, *added(title, tree, "--reverse")]
    assert not [path for path in tree.rglob("*.*") if re.search(rb"(?i)nf4.?scales", path.read_bytes())]
    assert added(title, tree) == files[1:] and len(files) <= MOST_FILES
    assert all((tree / name).read_bytes() == (ROOT / name).read_bytes() for name in files[1:])


@pytest.mark.parametrize("name", SECTIONS)
def test_section(name: str, tiny_base: Path, tree: Path, tmp_path: Path) -> None:
    """What it adds is used by the function of extending_worker.py that is called so."""
    if name == "patches":
        pytest.importorskip("PIL", reason="the extra vision is not installed")
    assert len(added(SECTIONS[name], tree)) <= MOST_FILES
    (tmp_path / "work").mkdir()
    worker = (ROOT / "tests" / "extending_worker.py", name, tiny_base, tmp_path / "work")
    done = run_python(*worker, cwd=tree, PYTHONPATH=f"{tree}:{ROOT}")
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    print(*re.findall("^plan: .*", done.stdout, re.MULTILINE), sep="\n")
