"""tools/mutation.py on a function of one line: which of its mutants survive can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("mutmut", reason="tools/mutation.py needs mutmut, which the test extra brings")

FUNCTION = "def spread(low, high, most=9):\n    return min(high - low, most)\n"
TESTS = "from spread import spread\n\ndef test_it():\n    assert spread(1, 3) == 2\n"
SLOWER = "from spread import spread\n\ndef test_it():\n    assert spread(0, 99) == 9\n"
"""Only here `most` matters."""


def test_survivors_are_named(python, tmp_path: Path) -> None:
    """With their lines, and counted; what slower tests end is no survivor; nothing here is changed."""
    for name, text in (("spread", FUNCTION), ("test_fast", TESTS), ("test_slower", SLOWER)):
        (tmp_path / f"{name}.py").write_text(text)
    command = ROOT / "tools/mutation.py", "spread.py", "test_fast.py"
    done = python(*command, "--then", "test_slower.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == (
        "mutant 0, line 1:\n"
        "-def spread(low, high, most=9):\n"
        "+def spread(low, high, most=10):\n"
        "spread.py: of 6 mutants 5 were ended by a test, 0 by the clock; 1 survive test_fast.py.\n"
        "spread.py: of 6 mutants 6 were ended by a test, 0 by the clock; 0 survive test_slower.py.\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spread.py", "test_fast.py", "test_slower.py"]
    (tmp_path / "test_fast.py").write_text(TESTS.replace("2", "3"))
    done = python(*command, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("ConfigError: test_fast.py: fails without a mutant, too.")
