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
    "two_choices": "An evaluation task",
}
"""Function of extending_worker.py -> the section it is for."""
MOST_FILES = 3


def added(title: str, tree: Path) -> list[str]:
    """Put a section's blocks into `tree`; returns the files they make or change."""
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    files = []
    for name, text in re.findall(r"```python\n# (\S+)\n(.*?)```", section, re.DOTALL):
        assert not (tree / name).exists(), name
        (tree / name).write_text(text)
        files.append(name)
    for diff in re.findall(r"```diff\n(.*?)```", section, re.DOTALL):
        done = subprocess.run(["git", "apply", "-"], input=diff, cwd=tree, text=True, capture_output=True)
        assert done.returncode == 0, f"{title}: {done.stderr}"
        files += re.findall(r"^\+\+\+ b/(.*)", diff, re.MULTILINE)
    return files


@pytest.mark.parametrize("name", SECTIONS)
def test_section(name: str, tiny_base: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "accessory", tree / "accessory", ignore=shutil.ignore_patterns("__pycache__"))
    assert len(added(SECTIONS[name], tree)) <= MOST_FILES
    (tmp_path / "work").mkdir()
    worker = (ROOT / "tests" / "extending_worker.py", name, tiny_base, tmp_path / "work")
    done = run_python(*worker, cwd=tree, PYTHONPATH=f"{tree}:{ROOT}")
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    print(*re.findall("^plan: .*", done.stdout, re.MULTILINE), sep="\n")
