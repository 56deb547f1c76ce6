"""Assembles a fine-tuning run from its configuration: groups, base, method, data, engine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accessory.blueprint import Blueprint, draw_blueprint
from accessory.checkpoint.load import fill, resolve, targets
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
from accessory.config import FinetuneConfig, plain
from accessory.data.corpus import Corpus, build_corpus
from accessory.data.order import GlobalOrder
from accessory.engine import Engine, Schedule
from accessory.errors import ConfigError
from accessory.meta import MetaModel
from accessory.method import Attachment
from accessory.model.decoder import Decoder
from accessory.optim import LossScale, build_adamw
from accessory.parallel import groups
from accessory.parallel.agree import together
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.parallel.tensor import Slicing
from accessory.plan import device_memory, memory_plan, parameter_counts
from accessory.report import Reporter

CACHE_DIR = Path("accessory_data_cache")


def finetune(config: FinetuneConfig) -> MetaModel:
    """Run one job from flags to the last checkpoint; returns the trained model, sharded as it was in training.

    Raises `AccessoryError`s, the same on every rank.
    """
    layout = groups.start(config.device, config.model_parallel_size, config.dist_on_itp)
    torch.manual_seed(config.seed + layout.dp_rank)  # ranks that share a model draw the same dropout
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    output_dir = None if config.dry_run else config.output_dir
    together(lambda: _prepare_output(output_dir, layout))
    sources = together(lambda: _open_sources(config))
    blueprint = together(lambda: _blueprint(config, sources))
    decoder, attachment = together(lambda: blueprint.build(layout))
    corpus = together(lambda: _corpus(config, blueprint, layout))
    _announce(config, blueprint, decoder, attachment, layout, corpus)
    slicings = {target.name: target.slicing for target in targets(decoder)}
    model, data_parallel = _fill(config, blueprint, sources, decoder, attachment, layout)
    parameters = {name: p for name, p in decoder.named_parameters() if name in attachment.trainable}
    optimizer = build_adamw(parameters, config.lr, config.weight_decay)
    order = _order(config, corpus, layout)
    identity = _identity(config, blueprint, corpus, order)
    progress = _resume(config, optimizer, parameters, slicings, layout, identity)
    schedule = _schedule(config, order)
    only_trainable = config.only_save_trainable and len(parameters) < len(slicings)
    writer = _writer(config, sources, blueprint, corpus, "trainable" if only_trainable else "model")

    def save(progress: Progress, name: str) -> None:
        if output_dir is None:
            return
        weights = gather_whole(parameters if only_trainable else dict(decoder.named_parameters()), slicings)
        state = collect_training_state(optimizer, parameters, slicings)
        path = writer.write(name, weights, state, state_record(progress, identity))
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
    for block in decoder.layers:
        block.recompute = config.checkpointing
    model = MetaModel(decoder, blueprint.tokenizer, config.max_words)
    data_parallel.shard_root(model)
    return model, data_parallel


def _announce(
    config: FinetuneConfig,
    blueprint: Blueprint,
    decoder: Decoder,
    attachment: Attachment,
    layout: Layout,
    corpus: Corpus,
) -> None:
    trained, total = parameter_counts(decoder, attachment)
    packed = blueprint.quant_type
    stored = f"{packed} in the blocks, {config.precision} elsewhere" if packed else config.precision
    _say(
        layout,
        f"{blueprint.llama_type} on {layout.world_size} x {layout.device.type}: model parallel {layout.mp_size}, data "
        f"parallel {layout.dp_size} ({config.data_parallel}); weights in {stored}\n"
        f"trainable parameters: {trained:,} of {total:,} ({100 * trained / total:.3f} %)"
        + "".join(f"\n{note}" for note in blueprint.notes)
        + (f"\n--pretrained_type {config.pretrained_type} is needless: formats are told from the files"
           if config.pretrained_type else ""),
    )  # fmt: skip
    tokens = config.batch_size * min(config.max_words, int(corpus.lengths.max()))
    plan = memory_plan(
        decoder, attachment, layout,
        tokens=tokens, checkpointing=config.checkpointing, data_parallel=config.data_parallel,
    )  # fmt: skip
    title = f"a micro-batch of {tokens:,} tokens (the longest documents together)"
    _say(layout, plan.table(title, device_memory(layout.device)))


def _identity(config: FinetuneConfig, blueprint: Blueprint, corpus: Corpus, order: GlobalOrder) -> dict[str, Any]:
    """What must not change between a run and its resumption, or it would be another run."""
    return {
        "llama_type": blueprint.llama_type,
        "settings": blueprint.method.settings.model_dump(),
        "data": corpus.fingerprint,
        "seed": config.seed,
        "global_batch": order.global_batch,
        "quantization": blueprint.quant_type,
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
    base = [source for source in sources if source.path != config.resume]
    documents = {
        "config.json": blueprint.settings(),
        "meta.json": {"llama_type": blueprint.llama_type},
        RUN_FILE: run_record(plain(config), base, blueprint.quant_type, corpus.fingerprint),
    }
    return CheckpointWriter(config.output_dir, stem, documents, blueprint.tokenizer)


def _say(layout: Layout, text: str) -> None:
    if layout.is_main:
        print(text, flush=True)
