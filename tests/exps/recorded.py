"""What scripts call, without calling it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FINETUNE = ROOT / "exps" / "finetune"
RECORDER = """#!/bin/bash
printf '%s\\0' "$@" > "$RECORD"
"""
"""Takes torchrun's place."""


def run_recorded(
    script: Path, *arguments: str | Path, folder: Path, environment: Mapping[str, str], **variables: str
) -> list[str]:
    """The words that a script started in `folder` gives to torchrun. Fails where the script does."""
    recorder, record = folder / "bin" / "torchrun", folder / "record"
    recorder.parent.mkdir(exist_ok=True)
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    settings = {"PATH": f"{recorder.parent}:/usr/bin:/bin", "RECORD": str(record), "OUTPUT": str(folder / "out")}
    command = ["bash", str(script), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env={**environment, **settings, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return record.read_text().split("\0")[:-1]


def flags_in(words: list[str]) -> dict[str, list[str]]:
    """Flag -> the words behind it; of one that stands twice, the last."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            found.pop(word[2:], None)
            last = found.setdefault(word[2:], [])
        else:
            last.append(word)
    return found
