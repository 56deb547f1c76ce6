"""Which checkpoints a run begins from, and what an earlier run may have left beside them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from accessory.checkpoint.manifest import read_manifest, verify
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.run_checkpoints import checkpoints_in, latest_checkpoint, remove
from accessory.checkpoint.run_record import began_at, with_base
from accessory.checkpoint.source import Source
from accessory.checkpoint.vision_part import without_vision
from accessory.config import FinetuneConfig, PretrainConfig, RunConfig
from accessory.errors import CheckpointError, ConfigError
from accessory.parallel.launcher import restart_count
from accessory.run.status import is_restart_of_same_launch


def find_start(config: RunConfig) -> tuple[Path | None, list[str]]:
    """(the checkpoint to go on from, or None to begin; what to tell the user about it).

    The checkpoint is compared with its manifest. A run that torchrun or SLURM starts again goes on from the newest
    whole checkpoint in `--output_dir` by itself. Raises `CheckpointError` if what is to be resumed is damaged or
    missing, `ConfigError` if `--output_dir` holds checkpoints that this run would be mixed up with.
    """
    output_dir = config.output_dir
    there = checkpoints_in(output_dir) if output_dir and output_dir.is_dir() else []
    restarted = is_restart_of_same_launch(output_dir)
    if restarted and there:
        found, faults = latest_checkpoint(output_dir)
        if config.resume and not config.resumes_latest and verify(config.resume) >= read_manifest(found)["step"]:
            found = config.resume
        return found, [*faults, f"attempt {restart_count()}, started again: goes on from {found}"]
    if config.resumes_latest and not restarted:
        found, faults = latest_checkpoint(output_dir)
        return found, [*faults, f"--resume latest: {found}"]
    begin = None if config.resumes_latest else config.resume
    step = verify(begin) if begin else 0
    if config.dry_run:
        return begin, []
    return begin, _make_way([path for path in there if _step(path) > step], config)


def open_sources(config: FinetuneConfig) -> list[Source]:
    """What `--pretrained_path` names, behind its base, then what is resumed. Raises `CheckpointError`."""
    base = with_base(list(config.pretrained_path), config.vision_path, config.no_visual)
    resumed = [open_source(config.resume)] if config.resume else []
    return base + (without_vision(resumed) if config.no_visual else resumed)


def open_pretrained(config: PretrainConfig) -> list[Source]:
    """The checkpoint to begin from, if any, then what is resumed. Raises `CheckpointError`."""
    given = with_base(list(config.pretrained_path), no_visual=True) if config.pretrained_path else []
    return given + ([open_source(config.resume)] if config.resume else [])


def run_began(config: RunConfig, sources: list[Source]) -> datetime:
    """When the run was first started, for chat templates that print the time."""
    resumed = next((source for source in sources if source.path == config.resume), None)
    return began_at(resumed) if resumed else datetime.now().replace(microsecond=0)


def _step(checkpoint: Path) -> float:
    """After how many steps it was saved; infinitely many where it does not say."""
    try:
        return read_manifest(checkpoint)["step"]
    except CheckpointError:
        return float("inf")


def _make_way(further: list[Path], config: RunConfig) -> list[str]:
    """Remove checkpoints `further` than this run's start, if the user says so: `--resume latest` would take them."""
    if not further:
        return []
    names = ", ".join(path.name for path in further)
    if not config.overwrite:
        raise ConfigError(
            f"--output_dir {config.output_dir}: holds checkpoints further than where this run begins: {names}. "
            "Go on from the newest with --resume latest, remove them with --overwrite, or give another --output_dir."
        )
    faults = [fault for path in further if (fault := remove(path))]
    if faults:
        raise ConfigError("\n".join(["--overwrite:", *faults]))
    return [f"--overwrite: removed {names}"]
