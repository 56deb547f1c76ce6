"""What a user can get wrong, said once and clearly. Everything raised on purpose derives from `AccessoryError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError


class AccessoryError(Exception):
    """A fault the user can mend. The message names the file, key or flag, what was found and what was expected.

    status: what the process exits with, and `run_status.json` says. common: whether all ranks raise it together.
    """

    status = 1
    common = False


class ConfigError(AccessoryError):
    """A flag, a configuration file, or a combination of choices that cannot work."""

    status = 2


class DataError(AccessoryError):
    """A data file or a record that cannot be trained on."""

    status = 3


class TokenizerError(AccessoryError):
    """A tokenizer that is missing, unreadable or does not fit the model."""

    status = 3


class CheckpointError(AccessoryError):
    """A checkpoint that is missing, damaged, or does not fit the model."""

    status = 4


class DiskFullError(CheckpointError):
    """A checkpoint for which there is no room."""

    status = 6


class ParallelError(AccessoryError):
    """A process layout that does not fit the model or the machine."""

    status = 2


class LostRankError(AccessoryError):
    """Another process of the run died, hangs, or failed."""

    status = 7


class TrainingError(AccessoryError):
    """Training that cannot go on."""


class NotFiniteError(TrainingError):
    """A loss or gradient that is infinite or not a number."""

    status = 5


class OutOfMemoryError(TrainingError):
    """A step that does not fit into memory."""


class Preempted(AccessoryError):
    """The run was asked to stop, and did, with everything saved: it goes on with --resume latest."""

    status = 75  # EX_TEMPFAIL of sysexits.h: try again later


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the candidate closest to `name`, or the empty string if none is close."""
    match = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


def is_there(path: Path) -> bool:
    """Whether a path that a user gave exists; one that cannot be a path, being too long, does not."""
    try:
        return path.exists()
    except OSError:
        return False


def is_file(path: Path) -> bool:
    """Whether a path that a user or a file gave is one of a file."""
    return is_there(path) and path.is_file()


def explain_validation(error: ValidationError, source: str, valid_names: Iterable[str]) -> str:
    """Turn pydantic's findings into one line per fault: where, what was found, what was expected, the nearest name."""
    names, lines = list(valid_names), []
    for fault in error.errors(include_url=False):
        key = ".".join(str(part) for part in fault["loc"])
        if not fault["loc"]:  # a rule on several keys, which says their values itself
            lines.append(f"{source}: {fault['msg'].removeprefix('Value error, ')}.")
        elif fault["type"] == "extra_forbidden":
            lines.append(f"{source}: unknown key {key!r}.{nearest(str(fault['loc'][-1]), names)}")
        elif fault["type"] == "missing":
            lines.append(f"{source}: {key!r} is required and missing.")
        else:
            lines.append(f"{source}: {key!r} is {fault['input']!r}: {fault['msg']}.")
    return "\n".join(lines)
