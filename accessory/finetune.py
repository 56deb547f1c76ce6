"""Assembles a fine-tuning run from its configuration: groups, base, method, data, engine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from accessory.blueprint import Blueprint, draw_blueprint
from accessory.checkpoint.latest import latest_checkpoint
from accessory.checkpoint.load import fill, resolve, targets
from accessory.checkpoint.manifest import verify
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.run_record import RUN_FILE, run_record, with_base
from accessory.checkpoint.save import CheckpointWriter, gather_whole
from accessory.checkpoint.source import Source
from accessory.checkpoint.training_state import (
    Progress,
    collect_training_state,
    load_training_state,
    state_record,
)
from accessory.checkpointing import check_offload, choose_layers, recompute_layers
from accessory.config import FinetuneConfig, plain
from accessory.data.corpus import Corpus, build_corpus
from accessory.data.order import GlobalOrder
from accessory.engine import Engine, Schedule
from accessory.errors import ConfigError
from accessory.kernels.torch_compile import compile_fusible
from accessory.meta import MetaModel
from accessory.method import Attachment
from accessory.model.decoder import Decoder
from accessory.optim import LossScale, build_optimizer
from accessory.parallel import groups
from accessory.parallel.agree import together
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.parallel.tensor import Slicing
from accessory.plan import MemoryPlan, device_memory, memory_plan, parameter_counts
from accessory.report import Reporter

CACHE_DIR = Path("accessory_data_cache")


def finetune(config: FinetuneConfig) -> MetaModel:
    """Run one job from flags to the last checkpoint; returns the trained model, sharded as it was in training.

    Raises `AccessoryError`s, the same on every rank.
    """
    layout = groups.start(config.device, config.model_parallel_size, config.dist_on_itp)
    torch.manual_seed(config.seed + layout.dp_rank)  # ranks that share a model draw the same dropout
    compile_fusible(config.compile)
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    output_dir = None if config.dry_run else config.output_dir
    together(lambda: check_offload(config.offload_inputs, layout.device))
    together(lambda: _prepare_output(output_dir, layout))
    config = _find_checkpoint(config, layout)
    sources = together(lambda: _open_sources(config))
    blueprint = together(lambda: _blueprint(config, sources))
    decoder, attachment = together(lambda: blueprint.build(layout))
    corpus = together(lambda: _corpus(config, blueprint, layout))
    order = together(lambda: _order(config, corpus, layout))
    recomputed = _plan_memory(config, blueprint, decoder, attachment, layout, order)
    slicings = {target.name: target.slicing for target in targets(decoder)}
    model, data_parallel = _fill(config, blueprint, sources, decoder, attachment, layout)
    recompute_layers(decoder, recomputed, offload=config.offload_inputs, device=layout.device)
    parameters = {name: p for name, p in decoder.named_parameters() if name in attachment.trainable}
    optimizer = build_optimizer(config.optim, parameters, config.lr, config.weight_decay)
    identity = _identity(config, blueprint, _base(config, sources), corpus, order)
    progress = _resume(config, optimizer, parameters, slicings, layout, identity)
    schedule = _schedule(config, order)
    only_trainable = config.only_save_trainable and len(parameters) < len(slicings)
    writer = _writer(config, sources, blueprint, corpus, "trainable" if only_trainable else "model")

    def save(progress: Progress, name: str) -> None:
        if output_dir is None:
            return
        weights = gather_whole(parameters if only_trainable else dict(decoder.named_parameters()), slicings)
        state = collect_training_state(optimizer, parameters, slicings)
        path = writer.write(name, weights, state, state_record(progress, identity), progress.total_steps)
        reporter.say(f"saved {path}")

    reporter = Reporter(output_dir, schedule.total_steps, progress.total_steps, enabled=layout.is_main)
    engine = Engine(
        model=model,
        parameters=parameters,
        slicings=slicings,
        optimizer=optimizer,
        order=order,
        schedule=schedule,
        data_parallel=data_parallel,
        layout=layout,
        reporter=reporter,
        save=save,
        loss_scale=LossScale(config.precision == "fp16"),
        pin_memory=config.pin_mem and layout.device.type == "cuda",
    )
    try:
        engine.train(progress)
    finally:
        reporter.close()
    return model


def _prepare_output(output_dir: Path | None, layout: Layout) -> None:
    """Make the directory now, before hours are spent on what could then not be written."""
    if output_dir is None or not layout.is_main:
        return
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ConfigError(f"--output_dir {output_dir}: cannot be written to ({error.strerror}).") from error


def _find_checkpoint(config: FinetuneConfig, layout: Layout) -> FinetuneConfig:
    """`config` with the checkpoint that `--resume` means, which is compared with its manifest. A collective."""
    if config.resume is None:
        return config
    found = [config.resume]

    def look() -> None:
        if not layout.is_main:  # files are read once, not by every rank
            return
        if config.resumes_latest:
            found[0], faults = latest_checkpoint(config.output_dir)
            _say(layout, "\n".join([*faults, f"--resume latest: {found[0]}"]))
        else:
            verify(found[0])

    together(look)
    dist.broadcast_object_list(found)
    return config.model_copy(update={"resume": found[0]})


def _open_sources(config: FinetuneConfig) -> list[Source]:
    sources = with_base(list(config.pretrained_path))
    return sources + ([open_source(config.resume)] if config.resume else [])


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


def _corpus(config: FinetuneConfig, blueprint: Blueprint, layout: Layout) -> Corpus:
    corpus = build_corpus(
        config.data_config,
        blueprint.tokenizer,
        max_words=config.max_words,
        dialog=config.dialog,
        threads=max(config.num_workers, 1),
        cache_dir=CACHE_DIR if config.cache_ann_on_disk else None,
    )
    _say(
        layout,
        f"data {config.data_config}: {corpus.report}\nfirst document, what is learned between « »:\n{corpus.show(0)}",
    )
    return corpus


def _order(config: FinetuneConfig, corpus: Corpus, layout: Layout) -> GlobalOrder:
    return GlobalOrder(
        corpus,
        batch_size=config.batch_size,
        accum_iter=config.accum_iter,
        dp_rank=layout.dp_rank,
        dp_size=layout.dp_size,
        seed=config.seed,
        max_tokens=config.max_tokens,
    )


def _fill(
    config: FinetuneConfig,
    blueprint: Blueprint,
    sources: list[Source],
    decoder: Decoder,
    attachment: Attachment,
    layout: Layout,
) -> tuple[MetaModel, DataParallel]:
    """Read, quantize and shard the weights, block by block."""
    tensors = together(lambda: resolve(decoder, sources, attachment, initialize=config.resume is None))
    data_parallel = DataParallel(layout, config.data_parallel, blueprint.method.trains_base)
    together(lambda: fill(decoder, tensors, attachment, layout, data_parallel, config.seed))
    model = MetaModel(decoder, blueprint.tokenizer, config.max_words)
    data_parallel.shard_root(model)
    return model, data_parallel


def _plan_memory(
    config: FinetuneConfig,
    blueprint: Blueprint,
    decoder: Decoder,
    attachment: Attachment,
    layout: Layout,
    order: GlobalOrder,
) -> int:
    """Say what will run and what memory it takes; returns how many layers to recompute."""

    def plan(layers: int) -> MemoryPlan:
        return memory_plan(
            decoder, attachment, layout,
            tokens=order.most_tokens, longest=min(config.max_words, order.most_tokens),
            micro_batches=2 if config.accum_iter > 1 or config.max_tokens else 1,  # whether gradients wait for others
            checkpointing=layers, data_parallel=config.data_parallel, optim=config.optim,
            offload=config.offload_inputs,
        )  # fmt: skip

    n_layers = len(decoder.layers)
    recomputed, why = choose_layers(config.checkpointing, n_layers, plan, layout, _remedies(config))
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
    _say(layout, plan(recomputed).table(title, device_memory(layout.device)))
    return recomputed


def _remedies(config: FinetuneConfig) -> str:
    """Flags that make a step smaller and are not used yet."""
    found = ["a smaller --max_words"]
    found.append("a smaller --batch_size" if config.max_tokens is None else "a smaller --max_tokens")
    found += [] if config.quant else ["--quant with a method that trains a small part"]
    found += [] if config.optim == "adamw8bit" else ["--optim adamw8bit"]
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
        "data": corpus.fingerprint,
        "seed": config.seed,
        "global_batch": order.global_batch,
        "quantization": blueprint.quant_type,
        "optim": config.optim,
    }


def _resume(
    config: FinetuneConfig,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    slicings: dict[str, Slicing],
    layout: Layout,
    identity: dict[str, Any],
) -> Progress:
    if config.resume is None:
        return Progress()
    progress, same_layout = together(
        lambda: load_training_state(config.resume, optimizer, parameters, slicings, layout, identity)
    )
    note = "" if same_layout else "; another layout than before, so not bit for bit"
    _say(layout, f"resuming {config.resume} after step {progress.total_steps}{note}")
    return progress


def _schedule(config: FinetuneConfig, order: GlobalOrder) -> Schedule:
    return Schedule(
        epochs=config.epochs,
        steps_per_epoch=order.steps_per_epoch,
        warmup_epochs=config.warmup_epochs,
        lr=config.lr,
        min_lr=config.min_lr,
        clip_grad=config.clip_grad,
        save_every_epochs=config.save_interval,
        save_every_steps=max(config.save_iteration_interval // config.accum_iter, 1),
        max_steps=1 if config.dry_run else config.max_steps,
    )


def _writer(
    config: FinetuneConfig, sources: list[Source], blueprint: Blueprint, corpus: Corpus, stem: str
) -> CheckpointWriter:
    base = _base(config, sources)
    documents = {
        "config.json": blueprint.settings(),
        "meta.json": {"llama_type": blueprint.llama_type},
        RUN_FILE: run_record(plain(config), base, blueprint.quant_type, corpus.fingerprint),
    }
    return CheckpointWriter(config.output_dir, stem, documents, blueprint.tokenizer)


def _say(layout: Layout, text: str) -> None:
    if layout.is_main:
        print(text, flush=True)
