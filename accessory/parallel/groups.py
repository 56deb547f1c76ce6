"""Process groups of model and data parallelism. A model-parallel group has consecutive ranks, as in fairscale."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout  # it has no public name (torch 2.13)

from accessory.errors import AccessoryError, ParallelError
from accessory.parallel.allocator import forget_old_shapes, keep_freed_memory
from accessory.parallel.rendezvous import meet
from accessory.parallel.root_cause import Witness

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
CPU = torch.device("cpu")
_witness: Witness | None = None


@dataclass(frozen=True)
class Layout:
    """This process's place: `world_size` = `mp_size` x `dp_size`; rank = dp_rank * mp_size + mp_rank."""

    rank: int = 0
    world_size: int = 1
    mp_rank: int = 0
    mp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0


def launch_environment(dist_on_itp: bool = False) -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's, OpenMPI's (`dist_on_itp`) or SLURM's variables, else one process.

    The rendezvous address comes from MASTER_ADDR and MASTER_PORT; torchrun sets them, and SLURM's launch node and job
    number stand in for them where they are missing.
    """
    env = os.environ
    if dist_on_itp:
        names = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"
    elif "RANK" in env and "WORLD_SIZE" in env:
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    elif "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        names = "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"
        if "SLURM_LAUNCH_NODE_IPADDR" in env:
            env.setdefault("MASTER_ADDR", env["SLURM_LAUNCH_NODE_IPADDR"])
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
    else:
        return 0, 1, 0
    missing = [name for name in (*names[:2], "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise ParallelError(f"A run of several processes needs the environment variables {', '.join(missing)}.")
    return int(env[names[0]]), int(env[names[1]]), int(env.get(names[2], "0"))


def choose_device(name: str, local_rank: int) -> torch.device:
    """`auto` is CUDA where there is any, else the CPU. Raises `ParallelError` for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return CPU
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise ParallelError(f"--device {name!r} is not one of auto, cpu, cuda.")
    if not torch.cuda.is_available():
        raise ParallelError("--device cuda: PyTorch sees no CUDA device here. Use --device cpu.")
    local_rank = int(number) if number else local_rank
    if local_rank >= torch.cuda.device_count():
        visible = torch.cuda.device_count()
        raise ParallelError(f"Local rank {local_rank} has no GPU: {visible} visible. Start fewer processes per node.")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def start(
    device: str = "auto",
    model_parallel_size: int = 1,
    dist_on_itp: bool = False,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> Layout:
    """Join the process group and lay model-parallel and data-parallel groups over it. Called once a process.

    A rank that waits longer than `timeout` for the others gives up. Raises `ParallelError` where the device is missing
    or the world is not a multiple of `model_parallel_size`.
    """
    rank, world_size, local_rank = launch_environment(dist_on_itp)
    if model_parallel_size < 1 or world_size % model_parallel_size:
        raise ParallelError(
            f"--model_parallel_size {model_parallel_size} does not divide the {world_size} started processes; "
            f"sizes that do: {', '.join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)}. "
            "torchrun --nproc-per-node=N starts N.",
            common=True,
        )
    where = choose_device(device, local_rank)
    if where == CPU:
        keep_freed_memory()
        forget_old_shapes()
    if not dist.is_initialized():
        global _witness
        store = meet(rank, world_size, timeout)
        _witness = Witness(store, rank, world_size)
        backend = "nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if not fairscale_groups.model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints from rank 0
            fairscale_groups.initialize_model_parallel(model_parallel_size)
    limit_waiting(timeout)
    return Layout(
        rank=rank,
        world_size=world_size,
        mp_rank=fairscale_groups.get_model_parallel_rank(),
        mp_size=model_parallel_size,
        dp_rank=fairscale_groups.get_data_parallel_rank(),
        dp_size=world_size // model_parallel_size,
        device=where,
    )


def limit_waiting(timeout: timedelta) -> None:
    """From now on a rank gives up after waiting `timeout` for others in any of its groups."""
    for group in (None, model_parallel_group(), data_parallel_group()):
        _set_pg_timeout(timeout, group)


def root_cause(error: Exception) -> AccessoryError:
    """The error that all ranks report for `error` (see `Witness.root_cause`); `prints`: whether this rank prints it."""
    if isinstance(error, AccessoryError) and error.prints is not None:
        return error
    return (_witness or Witness(dist.HashStore(), _launched_rank(), 1)).root_cause(error)


def _launched_rank() -> int:
    """This process's rank before the ranks have met; 0 where its launcher does not say."""
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def stop() -> None:
    """Leave the groups; safe to call twice."""
    if fairscale_groups.model_parallel_is_initialized():
        fairscale_groups.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process(status: int = 0) -> NoReturn:
    """Leave the groups and end the process with `status`, skipping the interpreter's shutdown.

    Just after a collective, one of gloo's threads frees its tensors, for which it needs Python's lock. An interpreter
    that is shutting down ends such a thread, and C++ then aborts the process (Python 3.11, torch 2.13). `stop` joins
    only the threads of groups that nothing refers to, but sharded models, tracebacks and default arguments in
    `torch.distributed.nn` refer to them.
    """
    stop()
    atexit._run_exitfuncs()  # it has no public name (Python 3.11)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def model_parallel_group() -> dist.ProcessGroup:
    """The ranks that together hold one copy of the model."""
    return fairscale_groups.get_model_parallel_group()


def data_parallel_group() -> dist.ProcessGroup:
    """The ranks that hold the same slice of the model and different documents."""
    return fairscale_groups.get_data_parallel_group()
