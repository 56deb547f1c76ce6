"""tools/inspect_checkpoint.py as a process; what it says of each kind stands in tests/checkpoint/test_describe.py."""

from __future__ import annotations

from pathlib import Path


def test_lines_and_tensors(python, tiny_base: Path) -> None:
    """One line a fact; with --tensors one more for each tensor."""
    done = python("tools/inspect_checkpoint.py", tiny_base, "--tensors")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["path", str(tiny_base)]
    assert lines[1].split() == ["format", "Hugging", "Face"]
    assert len([line for line in lines if line.startswith("layers.")]) == 2 * 9
    assert "layers.0.feed_forward.w2.weight  F32  [128, 256]" in lines
    assert len(lines) == 10 + 21


def test_what_is_no_checkpoint(python, tmp_path: Path) -> None:
    """In a line that says what was found and what is known."""
    (tmp_path / "notes.txt").write_text("notes")
    done = python("tools/inspect_checkpoint.py", tmp_path)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"CheckpointError: {tmp_path}: found notes.txt. Expected a directory with ")
