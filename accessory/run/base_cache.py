"""`--cache_base`: what it takes is said and checked before any weight is read; then the files are opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from accessory.blueprint import Blueprint
from accessory.checkpoint.disk_space import check_disk_space
from accessory.config import FinetuneConfig
from accessory.errors import ConfigError
from accessory.memory.base_cache import BaseCache, states_of
from accessory.memory.row_file import RowFile
from accessory.method import METHODS
from accessory.model.decoder import Decoder
from accessory.parallel.agree import on_main, together
from accessory.run.identity import FinetuneJob
from accessory.run.lock import claim_directory

_FORMAT = 1  # part of the identity: raise it when a change lays rows out in another way, or makes other rows


def check_can_cache(config: FinetuneConfig, blueprint: Blueprint) -> None:
    """Raise `ConfigError` for `--cache_base` with a method that changes the base, or goes back through it."""
    if config.cache_base and not blueprint.method.keeps_base:
        others = ", ".join(f"...{method.suffix}" for method in METHODS.values() if method.keeps_base)
        raise ConfigError(
            f"--cache_base {config.cache_base}: with --llama_type {blueprint.llama_type} gradients go through the "
            f"whole base, whose states are then other ones in each step. It goes with --llama_type {others}."
        )


def plan_base_cache(job: FinetuneJob, decoder: Decoder) -> tuple[RowFile | None, list[str]]:
    """(the cache's files, not opened yet; what to tell the user), for a decoder on meta.

    Raises `ConfigError` where they hold what another base or other data gave, or nothing could be kept; `DiskFullError`
    where there is no room.
    """
    config = job.config
    if config.cache_base is None:
        return None, []
    states = states_of(decoder, config.cache_base_rows)
    if not states:
        raise ConfigError(
            f"--cache_base {config.cache_base}: gradients go through all of the base's {decoder.args.n_layers} blocks, "
            "so there is nothing to keep; set a smaller tail in --llama_config, or leave it out."
        )
    widths = " and ".join(str(width) for width in dict.fromkeys(state.width for state in states))
    said = f"{len(states)}, of blocks {decoder.read[0]} to {decoder.read[-1]}, {widths} wide"
    file = RowFile(config.cache_base, job.corpus.offsets, states, _identity(job, said))
    file.look()
    there = next(path for path in (config.cache_base, *config.cache_base.absolute().parents) if path.is_dir())
    check_disk_space(there, file.missing_bytes, "the base's states take", "or give --cache_base on another disk")
    return file, [
        f"cache of the base in {config.cache_base}: states {said}: {file.token_bytes:,} bytes a token, "
        f"{file.total_bytes / 1e9:,.3f} GB in all; {int(file.written.sum()):,} of {len(file.written):,} documents are "
        "there"
    ]


@contextmanager
def open_base_cache(file: RowFile, job: FinetuneJob) -> Iterator[BaseCache]:
    """The cache at work; while documents are missing, no other run may write there. A collective."""
    with ExitStack() as held:
        if file.missing_bytes:
            on_main(claim_directory, file.directory, held, "--cache_base")
            together(file.look)  # another run may have been at work there until now
        together(file.open)
        held.callback(file.close)
        yield held.enter_context(closing(BaseCache(file, job.layout, job.config.data_parallel)))


def _identity(job: FinetuneJob, states: str) -> dict[str, Any]:
    """All that the rows follow from, apart from how kernels round."""
    return {
        "format": _FORMAT,
        "base": job.identity["base"],
        "data": job.identity["data"],
        "quantization": job.blueprint.quant_type,
        "precision": job.config.precision,
        "model": job.blueprint.args.model_dump(mode="json"),
        "states": states,
        "rows": job.config.cache_base_rows,
    }
