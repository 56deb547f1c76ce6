"""Process groups of model and data parallelism. A model-parallel group has consecutive ranks, as in fairscale."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout  # it has no public name (torch 2.13)

from accessory.errors import AccessoryError, ParallelError
from accessory.parallel.allocator import forget_old_shapes, keep_freed_memory
from accessory.parallel.device import CPU, check_own_device, choose_device
from accessory.parallel.rendezvous import interface_towards, meet
from accessory.parallel.root_cause import Witness
from accessory.parallel.watch import Watch

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
_NCCL_LATER = timedelta(minutes=2)  # NCCL's own watchdog, which aborts the process, acts so much later than ours
_NCCL_SETTINGS = {
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",  # the main thread gets the same error, and reports it
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # with a dump, NCCL's watchdog waits a minute before it aborts: time for ours
}
_witness: Witness | None = None
_watch: Watch | None = None
_tellers: list[Callable[[AccessoryError], object]] = []


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
        _join(where, rank, world_size, timeout)
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


def _join(device: torch.device, rank: int, world_size: int, timeout: timedelta) -> None:
    """Meet the other ranks, and watch over them.

    Tensors of the host, and so all agreements and objects, go through gloo, and those of a GPU through NCCL. NCCL
    learns its device from the tensors and makes a communicator only for groups that use one. Bound to a device
    (`device_id`), it would make one of hundreds of MB for each group at once, groups of one rank included.
    """
    global _witness, _watch
    store = meet(rank, world_size, timeout)
    check_own_device(device, store, rank, world_size)
    _witness = Witness(store, rank, world_size)
    if world_size > 1 and (interface := interface_towards(os.environ["MASTER_ADDR"])):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if device.type == "cuda":
        for name, value in _NCCL_SETTINGS.items():
            os.environ.setdefault(name, value)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if world_size > 1:
        _watch = Watch(_witness, os.environ["MASTER_ADDR"], _tellers)


def limit_waiting(timeout: timedelta) -> None:
    """From now on a rank gives up after waiting `timeout` for others in any of its groups."""
    backends: list[dist.Backend] = []
    for group in (dist.group.WORLD, model_parallel_group(), data_parallel_group()):
        _set_pg_timeout(timeout, group)
        backends += [group._get_backend(device) for device in group._device_types]
    for backend in backends:
        if type(backend).__name__ == "ProcessGroupNCCL":  # compared by name: PyTorch for CPUs lacks the class
            backend._set_default_timeout(timeout + _NCCL_LATER)
    if _watch:
        _watch.timeout, _watch.backends = timeout.total_seconds(), backends


@contextlib.contextmanager
def supervised() -> Iterator[None]:
    """Inside this context all ranks compute together; a rank without progress for the time limit is taken to hang.

    All ranks enter it alike. Each call of `tick` is progress.
    """
    with _watch.supervised() if _watch else contextlib.nullcontext():
        yield


def tick(*_: object) -> None:
    """This rank makes progress. Takes anything, so that it can be a hook of a module."""
    if _watch:
        _watch.tick()


def tick_in_backward(_module: object, _given: object, result: torch.Tensor) -> None:
    """A module's forward hook: this rank makes progress when the backward reaches what the module made."""
    if result.requires_grad:
        result.register_hook(tick)


@contextlib.contextmanager
def when_lost(teller: Callable[[AccessoryError], object]) -> Iterator[None]:
    """Inside this context `teller` gets the error if another rank is lost and no exception reaches the main thread.

    The process is then ended. The innermost teller is called first.
    """
    _tellers.append(teller)
    try:
        yield
    finally:
        _tellers.remove(teller)


def root_cause(error: Exception) -> AccessoryError:
    """The error that all ranks report for `error` (see `Witness.root_cause`); `prints`: whether this rank prints it."""
    if isinstance(error, AccessoryError) and error.prints is not None:
        return error
    if _watch:
        _watch.claim()
    return (_witness or Witness(dist.HashStore(), _launched_rank(), 1)).root_cause(error)


def _launched_rank() -> int:
    """This process's rank before the ranks have met; 0 where its launcher does not say."""
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def stop() -> None:
    """Leave the groups, as all ranks do; safe to call twice. A later failure concerns this process only."""
    global _witness
    if _watch:
        _watch.leave()
        _watch.backends = ()
    if fairscale_groups.model_parallel_is_initialized():
        fairscale_groups.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    _witness = None


def end_process(status: int = 0) -> NoReturn:
    """End the process with `status`, skipping the interpreter's shutdown; if all went well, leave the groups before.

    After a failure NCCL would wait in `stop` for ranks that are still in a collective, and all would keep their GPUs.

    Just after a collective, one of gloo's threads frees its tensors, for which it needs Python's lock. An interpreter
    that is shutting down ends such a thread, and C++ then aborts the process (Python 3.11, torch 2.13). `stop` joins
    only the threads of groups that nothing refers to, but sharded models, tracebacks and default arguments in
    `torch.distributed.nn` refer to them.
    """
    if status == 0:
        stop()
    elif _watch:
        _watch.claim()
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
