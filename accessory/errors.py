"""What a user can get wrong, said once and clearly. Everything raised on purpose derives from `AccessoryError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import ValidationError


class AccessoryError(Exception):
    """A fault the user can mend. The message names the file, key or flag, what was found and what was expected."""


class ConfigError(AccessoryError):
    """A flag, a configuration file, or a combination of choices that cannot work."""


class DataError(AccessoryError):
    """A data file or a record that cannot be trained on."""


class TokenizerError(AccessoryError):
    """A tokenizer that is missing, unreadable or does not fit the model."""


class CheckpointError(AccessoryError):
    """A checkpoint that is missing, damaged, or does not fit the model."""


class ParallelError(AccessoryError):
    """A process layout that does not fit the model or the machine."""


class TrainingError(AccessoryError):
    """Training that cannot go on, such as a loss that is no longer finite."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the candidate closest to `name`, or the empty string if none is close."""
    match = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


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
