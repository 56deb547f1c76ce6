"""The errors that a user can mend, and their wording. Everything raised on purpose derives from `AccessoryError`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError


class AccessoryError(Exception):
    """A fault the user can mend. The message names the file, key or flag, what was found and what was expected.

    status: what the process exits with, and `run_status.json` says. common: whether all ranks raise it together.
    prints: whether this rank prints it for all; None until `groups.root_cause` has decided that.
    """

    status = 1

    def __init_subclass__(cls, status: int | None = None) -> None:
        cls.status = status or cls.status

    def __init__(self, message: str = "", *, common: bool = False, prints: bool | None = None) -> None:
        super().__init__(message)
        self.common, self.prints = common, prints


class ConfigError(AccessoryError, status=2):
    """A flag, a configuration file, or a combination of choices that cannot work."""


class DataError(AccessoryError, status=3):
    """A data file or a record that cannot be trained on."""


class TokenizerError(AccessoryError, status=3):
    """A tokenizer that is missing, unreadable or does not fit the model."""


class CheckpointError(AccessoryError, status=4):
    """A checkpoint that is missing, damaged, or does not fit the model."""


class DiskFullError(CheckpointError, status=6):
    """A checkpoint for which there is no room."""


class ParallelError(AccessoryError, status=2):
    """A process layout that does not fit the model or the machine."""


class LostRankError(AccessoryError, status=7):
    """Another process of the run died, hangs, or failed."""


class TrainingError(AccessoryError):
    """Training that cannot go on."""


class NotFiniteError(TrainingError, status=5):
    """A loss, a gradient or a probability that is infinite or not a number."""


class OutOfMemoryError(TrainingError):
    """A step that does not fit into memory."""


class Preempted(AccessoryError, status=75):  # EX_TEMPFAIL of sysexits.h: try again later
    """The run was asked to stop, and did, with everything saved: it goes on with --resume latest."""


_FULL = ("out of memory", "allocate memory", "STATUS_ALLOC_FAILED", "Failed to CUDA calloc")
"""Of CUDA, NCCL, Triton and pinned memory; of the CPU's allocator and the kernel; of CUDA's libraries; of NCCL."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU; few libraries have a type of error of their own for it."""
    said = isinstance(error, (RuntimeError, OSError)) and any(words in str(error) for words in _FULL)
    return said or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the candidate that `name` misspells or leaves a word off; else the empty string."""
    bare, names = name.lstrip("-"), {candidate.lstrip("-"): candidate for candidate in candidates}
    close = [
        n for n in difflib.get_close_matches(bare, names, n=5) if _edit_distance(bare, n) <= max(1, len(bare) // 4)
    ]
    longer = [n for n in names if len(bare) > 1 and (n.startswith(f"{bare}_") or n.endswith(f"_{bare}"))]
    found = close[:1] or longer * (len(longer) == 1)
    return f" Did you mean {names[found[0]]!r}?" if found else ""


def check_known(what: str, value: object, known: Collection[str]) -> None:
    """Raise `ConfigError` for a `value` of `what` that is none of the `known` ones."""
    if value not in known:
        raise ConfigError(f"{what} {value!r} is unknown.{nearest(str(value), known)} Known: {', '.join(known)}.")


def _edit_distance(one: str, other: str) -> int:
    """Edit distance (Damerau 1964): letters of `one` to change, remove, insert or swap with a neighbour for `other`."""
    before, last = [], list(range(len(other) + 1))
    for i, letter in enumerate(one):
        row = [i + 1]
        for j, wanted in enumerate(other):
            row.append(min(last[j] + (letter != wanted), last[j + 1] + 1, row[j] + 1))
            if i and j and (letter, one[i - 1]) == (other[j - 1], wanted):
                row[-1] = min(row[-1], before[j - 1] + 1)
        before, last = last, row
    return last[-1]


_HUB_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/(?P<name>[\w.-]+))")
_HUB_ADDRESS = re.compile(rf"(?:hf:/{{1,2}}|https?:/{{1,2}}huggingface\.co/){_HUB_NAME.pattern}/?(?P<folder>.*)")
"""Also with one slash, which is what a `Path` keeps of two."""


def hub_hint(path: str | Path) -> str:
    """What to do if a missing path is spelled like a repository on the Hugging Face Hub; else the empty string."""
    found = _HUB_NAME.fullmatch(str(path)) or _HUB_ADDRESS.fullmatch(str(path))
    if not found or is_there(Path(str(path).partition("/")[0])):
        return ""
    repository, name, folder = found["repository"], found["name"], found.groupdict().get("folder")
    only = f" --include '{folder}/*'" if folder else ""
    fetch = f"hf download {repository}{only} --local-dir {name}"
    given = f"{name}/{folder}" if folder else "the directory"
    return f" If this is a name on the Hugging Face Hub: download it first ({fetch}), then give {given}."


def is_there(path: Path) -> bool:
    """Whether a path that a user gave exists; one that cannot be a path, being too long, does not."""
    try:
        return path.exists()
    except OSError:
        return False


def is_file(path: Path) -> bool:
    """Whether a path that a user or a file gave is one of a file."""
    return is_there(path) and path.is_file()


def _nearest_value(value: str, fault: Mapping[str, Any]) -> str:
    """`nearest` among the values that pydantic's finding of a `Literal` lists, in quotation marks."""
    return nearest(value, re.findall(r"'([^']+)'", fault["ctx"]["expected"]))


def explain_validation(error: ValidationError, source: str, valid_names: Iterable[str]) -> str:
    """Turn pydantic's findings into one line per fault: where, what was found, what was expected, the nearest name."""
    names, lines = list(valid_names), []
    for fault in error.errors(include_url=False):
        key = ".".join(str(part) for part in fault["loc"])
        if not fault["loc"]:  # a rule on several keys, whose message holds their values
            lines.append(f"{source}: {fault['msg'].removeprefix('Value error, ')}.")
        elif fault["type"] == "extra_forbidden":
            lines.append(f"{source}: unknown key {key!r}.{nearest(str(fault['loc'][-1]), names)}")
        elif fault["type"] == "default_factory_not_called":
            continue  # its default depends on a wrong value, which has a line of its own
        elif fault["type"] == "missing":
            lines.append(f"{source}: {key!r} is required and missing.")
        else:
            hint = _nearest_value(str(fault["input"]), fault) if fault["type"] == "literal_error" else ""
            said = fault["msg"].removeprefix("Value error, ")
            lines.append(f"{source}: {key!r} is {fault['input']!r}: {said}.{hint}")
    return "\n".join(lines)
