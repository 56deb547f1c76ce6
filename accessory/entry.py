"""What every entry has in common: flags in, one clear message and a non-zero exit when something is wrong."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import fire
from pydantic import BaseModel
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from accessory.config import parse
from accessory.errors import AccessoryError, ConfigError
from accessory.foreign_names import unknown
from accessory.parallel import groups
from accessory.parallel.launcher import die_with_launcher

Config = TypeVar("Config", bound=BaseModel)
_GRACE = 5.0  # seconds that other ranks leave the main one to speak, before the launcher ends everyone


def run_entry(config_class: type[Config], main: Callable[[Config], None]) -> NoReturn:
    """Parse the command line into `config_class` and call `main`.

    Ends the process with status 0, that of the `AccessoryError` which ended it, or 1 for what was not foreseen.
    """
    die_with_launcher()
    status = 0
    try:
        main(parse(config_class, sys.argv[1:]))
    except Exception as error:
        status = _told(groups.settle(error))
    groups.end_process(status)


def run_tool(main: Callable[[], object]) -> NoReturn:
    """Run a command of `tools/`; what the user can mend becomes one line and a status of 1."""
    status = 0
    try:
        main()
    except AccessoryError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = 1
    groups.end_process(status)


def from_command_line(main: Callable[..., object]) -> Callable[[], object]:
    """`main` with the command line's arguments, for `run_tool`. Raises `ConfigError` for flags it does not know.

    fire itself would say so only after `main` has run without the flag, and without the nearest name.
    """

    def call() -> object:
        parameters = inspect.signature(main).parameters.values()
        _check_flags([f"--{parameter.name}" for parameter in parameters if parameter.kind != parameter.VAR_POSITIONAL])
        calls: list[tuple[tuple, dict]] = []
        fire.Fire(functools.wraps(main)(lambda *args, **kwargs: calls.append((args, kwargs))))
        return [main(*args, **kwargs) for args, kwargs in calls]

    return call


def _check_flags(flags: list[str]) -> None:
    words = sys.argv[1 : sys.argv.index("--") if "--" in sys.argv else None]  # what follows is fire's own
    given = [f"--{word[2:].partition('=')[0].replace('-', '_')}" for word in words if word.startswith("--")]
    known = {"--help", *flags, *(flag.replace("--", "--no") for flag in flags)}
    if faults := [f"Unknown flag {flag}{unknown(flag, flags, flags)}" for flag in given if flag not in known]:
        raise ConfigError("\n".join(faults))


def sources_and_target(paths: tuple[object, ...]) -> list[Path]:
    """A tool's positional arguments as paths: one or more to read, then the one to write. Raises `ConfigError`."""
    if len(paths) < 2:
        raise ConfigError(f"Found {' '.join(map(str, paths)) or 'nothing'}; expected SOURCE [SOURCE ...] TARGET.")
    return [Path(str(path)) for path in paths]


def _told(error: AccessoryError) -> int:
    """Print the message, if this rank is to; torchrun puts it into its report, too. Returns the process's status."""
    if error.speaks:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            get_error_handler().record_exception(error)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_GRACE)
    return error.status
