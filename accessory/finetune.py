"""Assembles a fine-tuning run from its configuration: groups, base, method, data, engine."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accessory import kernels
from accessory.blueprint import DTYPES, Blueprint, draw_blueprint
from accessory.checkpoint.load import fill, resolve, targets
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.run_record import RUN_FILE, began_at, run_record, with_base
from accessory.checkpoint.save import CheckpointWriter
from accessory.checkpoint.source import Source
from accessory.checkpoint.training_state import Progress, Resumption, find_resumption, restore_training_state
from accessory.config import FinetuneConfig, plain
from accessory.data.corpus import Corpus, build_corpus
from accessory.data.order import GlobalOrder
from accessory.engine import Engine, Schedule
from accessory.errors import ConfigError
from accessory.kernels.torch_compile import compile_fusible
from accessory.memory.plan import StepMemory, device_memory, parameter_counts
from accessory.memory.recompute import check_offload, choose_layers, recompute_layers
from accessory.meta import MetaModel
from accessory.method import Attachment
from accessory.model.decoder import Decoder
from accessory.optim import FIRST_LOSS_SCALE, build_optimizer
from accessory.parallel import groups
from accessory.parallel.agree import check_alike, on_main, together
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.parallel.tensor import Slicing
from accessory.run.lock import lock
from accessory.run.report import Reporter
from accessory.run.resuming import find_start
from accessory.run.saving import Saver
from accessory.run.signals import StopSignals
from accessory.run.status import RunStatus

CACHE_DIR = Path("accessory_data_cache")
FEW_STEPS = 30
"""A run with fewer optimizer steps is told so."""
_COURSE = ("precision", "lr", "min_lr", "warmup_epochs", "epochs", "weight_decay", "clip_grad")
"""Flags that set what a step does, or how long a run is."""
_FOLLOWS = {"min_lr": "lr", "warmup_epochs": "epochs"}
"""Flag -> the flag from which its value follows if it is not given."""
_PLACES = ("pretrained_path", "llama_config", "tokenizer_path", "data_config", "output_dir", "resume")
"""Flags that may differ from node to node: what lies there is compared instead."""
_ORDER = frozenset(("data", "seed", "global_batch"))
"""Of a run's identity: what its documents' order follows from."""
_SCALED = frozenset(("precision", "base", "quantization", "data"))
"""Keys of a run's identity on which the size of its gradients depends, and so fp16's loss scale."""


def finetune(config: FinetuneConfig) -> MetaModel:
    """Run one job from flags to the last checkpoint; returns the trained model, sharded as it was in training.

    How it ends is written to `run_status.json`. Raises an `AccessoryError` on every rank, `speaks` on it being true on
    the one that is to print it, or what was not foreseen.
    """
    with StopSignals() as signals, ExitStack() as held:
        layout = groups.start(config.device, config.model_parallel_size, config.dist_on_itp)
        output_dir = None if config.dry_run else config.output_dir
        on_main(_take_output, output_dir, held)
        status = RunStatus(output_dir, layout.world_size, layout.is_main)
        try:
            model = _train(config, layout, signals, status)
        except Exception as error:
            fault = groups.settle(error)
            status.end(fault)
            raise fault from None  # where it happened is printed if nobody foresaw it
        status.end(None)
        return model


@dataclass(frozen=True)
class _Job:
    """What is to be trained, on what, and by what it is known again.

    identity: what must not change between a run and its resumption; conditions: what its rounding depends on. began:
    when the run was first started.
    """

    config: FinetuneConfig
    layout: Layout
    sources: list[Source]
    blueprint: Blueprint
    corpus: Corpus
    order: GlobalOrder
    identity: dict[str, Any]
    conditions: dict[str, Any]
    began: datetime


def _train(config: FinetuneConfig, layout: Layout, signals: StopSignals, status: RunStatus) -> MetaModel:
    check_alike({name: value for name, value in plain(config).items() if name not in _PLACES})
    torch.manual_seed(config.seed + layout.dp_rank)  # ranks that share a model draw the same dropout
    compile_fusible(config.compile)
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    together(check_offload, config.offload_inputs, layout.device)
    start, notes = on_main(find_start, config)
    _say(layout, *notes)
    sources = together(_open_sources, config, start)
    blueprint = together(_blueprint, config, sources)
    decoder, attachment = together(blueprint.build, layout, config.data_parallel)
    job = _job(config.model_copy(update={"resume": start}), layout, sources, blueprint)
    found = _find_resumption(job)
    recomputed = _plan_memory(job, decoder, attachment)
    slicings = {target.name: target.slicing for target in targets(decoder)}
    model, data_parallel = _fill(job, decoder, attachment)
    recompute_layers(decoder, recomputed, offload=config.offload_inputs, device=layout.device)
    parameters = {name: p for name, p in decoder.named_parameters() if name in attachment.trainable}
    optimizer = build_optimizer(config.optim, parameters, config.lr, config.weight_decay)
    if found:
        together(restore_training_state, found, optimizer, parameters, slicings, layout)
    progress = _progress(found, layout)
    schedule = _schedule(config, job.order, progress)
    _say(layout, *_course(config, job.order, schedule, progress))
    together(status.begin, progress.total_steps)
    reporter = Reporter(status.output_dir, schedule.total_steps(progress), progress.total_steps, enabled=layout.is_main)
    with closing(reporter):
        engine = Engine(
            model=model,
            parameters=parameters,
            slicings=slicings,
            optimizer=optimizer,
            order=job.order,
            schedule=schedule,
            data_parallel=data_parallel,
            layout=layout,
            reporter=reporter,
            save=_saver(job, decoder, parameters, slicings, optimizer, reporter, status),
            signals=signals,
            scales_loss=config.precision == "fp16",
            pin_memory=config.pin_mem and layout.device.type == "cuda",
            skip_not_finite=config.not_finite == "skip",
            spare_memory=_remedies(config),
        )
        groups.limit_waiting(timedelta(seconds=config.timeout))
        signals.deferring = True
        engine.train(progress)
    if config.dry_run:
        _say(layout, "dry run: all is well, nothing was written")
    return model


def _job(config: FinetuneConfig, layout: Layout, sources: list[Source], blueprint: Blueprint) -> _Job:
    """Reads the data. All ranks have come to the same, or it raises."""
    began = on_main(_began, config, sources)
    corpus = together(_corpus, config, blueprint, layout, began)
    order = together(_order, config, blueprint, corpus, layout)
    identity = _identity(config, blueprint, _base(config, sources), corpus, order)
    check_alike(identity)
    return _Job(config, layout, sources, blueprint, corpus, order, identity, _conditions(config, layout), began)


def _take_output(output_dir: Path | None, held: ExitStack) -> None:
    """Make the directory and lock it now, before hours are spent on what could then not be written."""
    if output_dir is None:
        return
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ConfigError(f"--output_dir {output_dir}: cannot be written to ({error.strerror}).") from error
    held.enter_context(lock(output_dir))


def _open_sources(config: FinetuneConfig, start: Path | None) -> list[Source]:
    return with_base(list(config.pretrained_path)) + ([open_source(start)] if start else [])


def _blueprint(config: FinetuneConfig, sources: list[Source]) -> Blueprint:
    blueprint = draw_blueprint(
        sources,
        llama_type=config.llama_type,
        llama_config=config.llama_config,
        tokenizer_path=config.tokenizer_path,
        quant=config.quant,
        quant_type=config.quant_type if config.quant else None,
        precision=config.precision,
        train=True,
        new_tokens=config.new_tokens,
    )
    if blueprint.quant_type and not config.only_save_trainable:
        raise ConfigError(
            f"The base is packed as {blueprint.quant_type}, which is never written with the trained part: give "
            "--only_save_trainable."
        )
    return blueprint


def _began(config: FinetuneConfig, sources: list[Source]) -> datetime:
    """When the run was first started, for chat templates that print the time."""
    resumed = next((source for source in sources if source.path == config.resume), None)
    return began_at(resumed) if resumed else datetime.now().replace(microsecond=0)


def _corpus(config: FinetuneConfig, blueprint: Blueprint, layout: Layout, began: datetime) -> Corpus:
    corpus = build_corpus(
        config.data_config,
        blueprint.tokenizer,
        max_words=config.max_words,
        dialog=config.dialog,
        threads=max(config.num_workers, 1),
        cache_dir=CACHE_DIR if config.cache_ann_on_disk else None,
        max_skipped=config.max_skipped,
        clock=began,
    )
    args = blueprint.args
    _say(
        layout,
        *corpus.check_lengths(args.longest_document, args.stated_length),
        f"data {config.data_config}: {corpus.report}\nfirst document, what is learned between « »:\n{corpus.show(0)}",
    )
    if unheld := corpus.without(config.new_tokens):
        _say(layout, f"--new_tokens: no document holds {', '.join(unheld)}")
    return corpus


def _order(config: FinetuneConfig, blueprint: Blueprint, corpus: Corpus, layout: Layout) -> GlobalOrder:
    return GlobalOrder(
        corpus,
        batch_size=config.batch_size,
        accum_iter=config.accum_iter,
        dp_rank=layout.dp_rank,
        dp_size=layout.dp_size,
        seed=config.seed,
        max_tokens=config.max_tokens,
        share_prefixes=not blueprint.method.drops_out,
    )


def _fill(job: _Job, decoder: Decoder, attachment: Attachment) -> tuple[MetaModel, DataParallel]:
    """Read, quantize and shard the weights, block by block."""
    config, layout, blueprint = job.config, job.layout, job.blueprint
    tensors = together(resolve, decoder, job.sources, attachment, initialize=config.resume is None)
    data_parallel = DataParallel(layout, config.data_parallel, blueprint.method.trains_base)
    together(fill, decoder, tensors, attachment, layout, data_parallel, config.seed)
    model = MetaModel(decoder, blueprint.tokenizer, config.max_words)
    data_parallel.shard_root(model)
    return model, data_parallel


def _plan_memory(job: _Job, decoder: Decoder, attachment: Attachment) -> int:
    """Say what will run and what memory it takes; returns how many layers to recompute."""
    config, layout, blueprint, order = job.config, job.layout, job.blueprint, job.order

    step = StepMemory(
        decoder, attachment, layout,
        tokens=order.most_tokens, longest=min(config.max_words, order.most_tokens),
        micro_batches=2 if config.accum_iter > 1 or config.max_tokens else 1,  # whether gradients wait for others
        data_parallel=config.data_parallel, optim=config.optim, offload=config.offload_inputs,
    )  # fmt: skip
    n_layers = sum(1 for _ in decoder.blocks())
    recomputed, why = choose_layers(config.checkpointing, n_layers, step.plan, layout, _remedies(config))
    trained, total = parameter_counts(decoder, attachment)
    packed = blueprint.quant_type
    stored = f"{packed} in the blocks, {config.precision} elsewhere" if packed else config.precision
    notes = [
        f"{blueprint.llama_type} on {layout.world_size} x {layout.device.type}: model parallel {layout.mp_size}, data "
        f"parallel {layout.dp_size} ({config.data_parallel}); weights in {stored}",
        f"trainable parameters: {trained:,} of {total:,} ({100 * trained / total:.3f} %)",
        *blueprint.notes,
    ]
    if config.pretrained_type:
        notes.append(f"--pretrained_type {config.pretrained_type} is needless: formats are told from the files")
    if config.checkpointing not in ("none", 0):
        moved = ", their inputs kept in host memory" if config.offload_inputs else ""
        notes.append(f"recomputed layers: {recomputed} of {n_layers}{f' ({why})' if why else ''}{moved}")
    if config.optim == "paged_adamw" and layout.device.type == "cpu":
        notes.append("--optim paged_adamw is adamw on the CPU: there is no smaller memory to page out of")
    _say(layout, "\n".join(notes))
    title = f"a micro-batch of {order.most_tokens:,} tokens (the most there can be)"
    _say(layout, step.plan(recomputed).table(title, device_memory(layout.device)))
    return recomputed


def _remedies(config: FinetuneConfig) -> str:
    """Flags that make a step smaller and are not used yet."""
    found = ["a smaller --max_words"]
    found.append("a smaller --batch_size" if config.max_tokens is None else "a smaller --max_tokens")
    found += [] if config.quant else ["--quant with a method that trains a small part"]
    found += [] if config.optim == "adamw8bit" else ["--optim adamw8bit"]
    found += [] if config.checkpointing in ("all", "auto") else ["--checkpointing"]
    found += [] if config.data_parallel == "fsdp" else ["--data_parallel fsdp on more ranks"]
    return ", ".join([*found, "--model_parallel_size on more ranks"])


def _base(config: FinetuneConfig, sources: list[Source]) -> list[Source]:
    """What was given to begin with, without what is resumed."""
    return [source for source in sources if source.path != config.resume]


def _identity(
    config: FinetuneConfig, blueprint: Blueprint, base: list[Source], corpus: Corpus, order: GlobalOrder
) -> dict[str, Any]:
    """What must not change between a run and its resumption, or it would be another run."""
    return {
        "llama_type": blueprint.llama_type,
        "settings": blueprint.method.settings.model_dump(),
        "base": [source.fingerprint()[:16] for source in base],
        "data": corpus.identity,
        "seed": config.seed,
        "global_batch": order.global_batch,
        "quantization": blueprint.quant_type,
        "optim": config.optim,
        **{name: getattr(config, name) for name in _COURSE},
    }


def _conditions(config: FinetuneConfig, layout: Layout) -> dict[str, Any]:
    """What must not change for a resumed run to go on bit for bit: all that changes how sums are rounded."""
    return {
        "world_size": layout.world_size,
        "mp_size": layout.mp_size,
        "device": layout.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": kernels.computing(layout.device, DTYPES[config.precision]),
        **{name: getattr(config, name) for name in ("data_parallel", "batch_size", "accum_iter", "max_tokens")},
    }


def _find_resumption(job: _Job) -> Resumption | None:
    config = job.config
    if config.resume is None:
        return None
    follows = {name: of for name, of in _FOLLOWS.items() if name not in config.model_fields_set}
    found = together(find_resumption, config.resume, job.identity, job.conditions, config.allow_changed, follows)
    notes = [f"resuming {config.resume} after step {found.progress.total_steps}"]
    if found.inexact:
        notes.append(f"not bit for bit: {'; '.join(found.inexact)}")
    if found.changed:
        notes.append(f"changed, as --allow_changed says: {', '.join(found.changed)}")
    _say(job.layout, *notes)
    return found


def _progress(found: Resumption | None, layout: Layout) -> Progress:
    """Where to begin: the epoch anew if its order has changed, and with a new loss scale if the gradients' size has."""
    if found is None:
        return Progress()
    progress = found.progress
    if _SCALED.intersection(found.changed):
        progress = replace(progress, loss_scale=FIRST_LOSS_SCALE, good_steps=0)
    if progress.step and _ORDER.intersection(found.changed):
        _say(layout, f"the documents of epoch {progress.epoch} are other ones now: it begins anew")
        return replace(progress, step=0)
    return progress


def _schedule(config: FinetuneConfig, order: GlobalOrder, progress: Progress) -> Schedule:
    return Schedule(
        epochs=config.epochs,
        steps_per_epoch=order.steps_per_epoch,
        warmup_epochs=config.warmup_epochs,
        lr=config.lr,
        min_lr=config.min_lr,
        clip_grad=config.clip_grad,
        save_every_epochs=config.save_interval,
        save_every_steps=config.save_steps or max(config.save_iteration_interval // config.accum_iter, 1),
        save_every_minutes=config.save_minutes,
        max_steps=progress.total_steps + 1 if config.dry_run else config.max_steps,
        skipped_count=not config.dry_run,
    )


def _course(config: FinetuneConfig, order: GlobalOrder, schedule: Schedule, progress: Progress) -> list[str]:
    """Lines on how many steps the run has, and on what to change if they are too few to learn from."""
    steps = replace(schedule, max_steps=config.max_steps).total_steps(progress)  # not the one of a dry run
    epochs = steps / order.steps_per_epoch
    notes = [f"optimizer steps: {steps:,}, {order.steps_per_epoch:,} an epoch, of {order.global_batch} documents each"]
    if schedule.warmup_epochs >= epochs:
        reached = schedule.learning_rate(epochs)
        notes.append(
            f"the run ends within its warm-up, at a learning rate of {reached:.2e}: --warmup_epochs is "
            f"{schedule.warmup_epochs:g}, the run {epochs:.3g} epochs"
        )
    if steps < FEW_STEPS and config.max_steps is None:
        smaller = [f"a smaller --{name}" for name in ("accum_iter", "batch_size") if getattr(config, name) > 1]
        ways = " or ".join(["more --epochs", *smaller])
        notes.append(f"{steps} steps may be too few to learn anything; for more steps give {ways}")
    return notes


def _saver(
    job: _Job,
    decoder: Decoder,
    parameters: dict[str, nn.Parameter],
    slicings: dict[str, Slicing],
    optimizer: torch.optim.Optimizer,
    reporter: Reporter,
    status: RunStatus,
) -> Saver | None:
    """What the engine saves with, None for a run that writes nothing.

    Raises `DiskFullError` where there is no room for a checkpoint.
    """
    if status.output_dir is None:
        return None
    config, blueprint = job.config, job.blueprint
    only_trainable = config.only_save_trainable and len(parameters) < len(slicings)
    base = _base(config, job.sources)
    documents = {
        "config.json": blueprint.settings(),
        "meta.json": {"llama_type": blueprint.llama_type},
        RUN_FILE: run_record(
            plain(config),
            base,
            blueprint.quant_type,
            job.corpus.fingerprint,
            job.corpus.documents_by_prompt_layout(),
            job.began,
        ),
    }
    stem = "trainable" if only_trainable else "model"
    saver = Saver(
        writer=CheckpointWriter(status.output_dir, stem, documents, blueprint.tokenizer),
        weights=parameters if only_trainable else dict(decoder.named_parameters()),
        trained=parameters,
        slicings=slicings,
        optimizer=optimizer,
        identity=job.identity,
        conditions=job.conditions,
        layout=job.layout,
        reporter=reporter,
        status=status,
        keep_last=config.keep_last,
    )
    saver.check_room()
    return saver


def _say(layout: Layout, *texts: str) -> None:
    if layout.is_main and texts:
        print("\n".join(texts), flush=True)
