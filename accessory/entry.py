"""What every entry has in common: flags in, one clear message and a non-zero exit when something is wrong."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import fire
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from accessory.config import Config, parse
from accessory.errors import AccessoryError, ConfigError
from accessory.foreign_names import unknown
from accessory.parallel import groups
from accessory.parallel.launcher import die_with_launcher

_INTERRUPTED = 128 + signal.SIGINT  # as a shell calls it
_GRACE = 5.0  # seconds that a rank waits which prints nothing: once it exits, the launcher ends the others


def run_entry(config_class: type[Config], main: Callable[[Config], None]) -> NoReturn:
    """Parse the command line into `config_class` and call `main`.

    Ends the process with status 0, the status of the `AccessoryError` that was raised, 130 where Ctrl-C interrupted it,
    or 1 for any other exception.
    """
    die_with_launcher()
    status = 0
    try:
        with groups.when_lost(_report):
            main(parse(config_class, sys.argv[1:]))
    except Exception as error:
        status = _report(groups.root_cause(error))
    except KeyboardInterrupt:
        status = _interrupted()
    groups.end_process(status)


def run_tool(main: Callable[[], object]) -> NoReturn:
    """Run a command of `tools/`; an `AccessoryError` is printed in one line, by one rank, and the status is 1.

    Ctrl-C ends it with one line and status 130.
    """
    status = 0
    try:
        main()
    except Exception as error:
        fault = groups.root_cause(error)
        if fault.prints:
            print(f"{type(fault).__name__}: {fault}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = _interrupted()
    groups.end_process(status)


def _interrupted() -> int:
    """Say that Ctrl-C was pressed; the status to end with."""
    print("\nInterrupted.", file=sys.stderr, flush=True)
    return _INTERRUPTED


def from_command_line(main: Callable[..., object]) -> Callable[[], object]:
    """`main` with the command line's arguments, for `run_tool`. Raises `ConfigError` for flags it does not know.

    fire itself would say so only after `main` has run without the flag, and without the nearest name.
    """

    def call() -> object:
        """Call `main` with the flags of the command line, and return what its calls returned."""
        parameters = inspect.signature(main).parameters.values()
        _check_flags([f"--{parameter.name}" for parameter in parameters if parameter.kind != parameter.VAR_POSITIONAL])
        calls: list[tuple[tuple, dict]] = []
        fire.Fire(functools.wraps(main)(lambda *args, **kwargs: calls.append((args, kwargs))))
        return [main(*args, **kwargs) for args, kwargs in calls]

    return call


def _check_flags(flags: list[str]) -> None:
    words = sys.argv[1 : sys.argv.index("--") if "--" in sys.argv else None]  # words after -- are fire's own
    given = [f"--{word[2:].partition('=')[0].replace('-', '_')}" for word in words if word.startswith("--")]
    known = {"--help", *flags, *(flag.replace("--", "--no") for flag in flags)}
    if faults := [f"Unknown flag {flag}{unknown(flag, flags, flags)}" for flag in given if flag not in known]:
        raise ConfigError("\n".join(faults))


def sources_and_target(paths: tuple[object, ...]) -> list[Path]:
    """A tool's positional arguments as paths: one or more to read, then the one to write. Raises `ConfigError`."""
    if len(paths) < 2:
        raise ConfigError(f"Found {' '.join(map(str, paths)) or 'nothing'}; expected SOURCE [SOURCE ...] TARGET.")
    return [Path(str(path)) for path in paths]


def _report(error: AccessoryError) -> int:
    """Print the message if `error.prints`, also into torchrun's report. Returns the status to end the process with."""
    if error.prints:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            get_error_handler().record_exception(error)
    else:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_GRACE)
    return error.status
