"""What every entry has in common: flags in, one clear message and a non-zero exit when something is wrong."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import fire
import torch.distributed as dist
from pydantic import BaseModel

from accessory.config import parse
from accessory.errors import AccessoryError
from accessory.parallel import groups

Config = TypeVar("Config", bound=BaseModel)
_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
_GRACE = 5.0  # seconds that other ranks leave the main one to speak, before the launcher ends everyone


def run_entry(config_class: type[Config], main: Callable[[Config], None]) -> None:
    """Parse the command line into `config_class` and call `main`; leaves the process with status 0, 1 or 2 (flags)."""
    try:
        config = parse(config_class, sys.argv[1:])
    except AccessoryError as error:
        _leave(error, common=True, status=2)
    try:
        main(config)
    except AccessoryError as error:
        _leave(error, common=getattr(error, "common", False), status=1)
    finally:
        groups.stop()


def run_tool(main: Callable[[], object]) -> None:
    """Run a command of `tools/`; what the user can mend becomes one line and a status of 1."""
    try:
        main()
    except AccessoryError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    finally:
        groups.stop()


def from_command_line(main: Callable[..., object]) -> Callable[[], object]:
    """`main` with the command line's arguments, for `run_tool`; a flag it does not know leaves with status 2.

    fire itself would say so after `main` has run without the flag.
    """

    def call() -> object:
        calls: list[tuple[tuple, dict]] = []
        fire.Fire(functools.wraps(main)(lambda *args, **kwargs: calls.append((args, kwargs))))
        return [main(*args, **kwargs) for args, kwargs in calls]

    return call


def _leave(error: AccessoryError, common: bool, status: int) -> None:
    """Print the message once: by the main rank if all ranks share it, else by the rank that has it."""
    rank = dist.get_rank() if dist.is_initialized() else _launched_rank()
    if rank == 0 or not common:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(_GRACE)
    sys.exit(status)


def _launched_rank() -> int:
    return next((int(os.environ[name]) for name in _RANK_VARIABLES if name in os.environ), 0)
