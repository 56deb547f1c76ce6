"""Whether the files are there that flags name, and where those lie that were meant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accessory.data.finding import find_files
from accessory.errors import DataError, hub_hint, is_there


def misplaced_files(llama_config: Sequence[Path] = (), **flags: list[Path | None]) -> list[str]:
    """One fault for each given path that does not exist, or is a directory where a file is expected, by flag name."""
    found = [
        f"--{flag} {path}: no such file or directory.{hub_hint(path) or tree_hint(path)}"
        for flag, paths in {"llama_config": llama_config, **flags}.items()
        for path in paths
        if path is not None and not is_there(path)
    ]
    directories = [path for path in llama_config if is_there(path) and path.is_dir()]
    return found + [f"--llama_config {path}: is a directory; expected a JSON file." for path in directories]


def tree_hint(path: Path) -> str:
    """Where a missing path lies that is spelled from the root of the repository, as `configs/...`; else empty."""
    root = Path(__file__).resolve().parents[2]
    there = not path.is_absolute() and path.parts and is_there(root / path)
    return f" There is {root / path}: give that, or start in {root}." if there else ""


def missing_data(flag: str, given: list[Path], data_dir: Path) -> list[str]:
    """One fault for each value of `flag` that names nothing."""
    found = []
    for path in given:
        try:
            if not is_there(path):
                find_files(str(path), [Path()], data_dir)
        except DataError as error:
            found.append(f"--{flag} {str(error).removeprefix('path ')}{tree_hint(path)}")
    return found
