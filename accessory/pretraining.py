"""Assembles a pretraining run from its configuration: groups, model, data, engine."""

from __future__ import annotations

from tqdm import tqdm

from accessory import training
from accessory.blueprint import Blueprint, make_blueprint
from accessory.checkpoint.from_scratch import start_values
from accessory.checkpoint.source import Source
from accessory.checkpoint.training_state import read_order_state
from accessory.config import PretrainConfig
from accessory.data.raw.documents import TextReader
from accessory.data.raw.files import RawFile, read_meta, trained_on_too
from accessory.data.raw.held_out import corpus_of, packed_rows, text_rows
from accessory.data.raw.order import RowOrder, Shape, TextOrder
from accessory.data.raw.packed_file import PackedFile
from accessory.data.raw.packed_order import PackedOrder
from accessory.data.raw.plan import plan_text
from accessory.data.raw.skipped import Skipped
from accessory.errors import ConfigError
from accessory.meta import MetaModel
from accessory.model.families import FAMILIES
from accessory.parallel.agree import check_alike, on_main, together
from accessory.parallel.data import summed_on_host
from accessory.parallel.groups import Layout
from accessory.run.identity import PretrainJob, keeps_order
from accessory.run.preview import preview
from accessory.run.resuming import open_pretrained, run_began
from accessory.run.schedule import pretraining_notes, pretraining_schedule
from accessory.run.signals import StopSignals
from accessory.run.status import RunStatus
from accessory.run.validation_set import ValidationSet, whole_set
from accessory.training import Prepared, find_progress, say


def pretrain(config: PretrainConfig) -> MetaModel:
    """Run one job from flags to the last checkpoint; returns the trained model, as `training.run` does."""
    return training.run(config, _train)


def _train(config: PretrainConfig, layout: Layout, signals: StopSignals, status: RunStatus) -> MetaModel:
    config = training.begin(config, layout)
    sources = together(open_pretrained, config)
    blueprint = together(_blueprint, config, sources)
    decoder, attachment = together(blueprint.build, layout, config.data_parallel)
    if not config.pretrained_path:
        attachment.initial |= start_values(decoder)
    job = _job(config, layout, sources, blueprint)
    found, progress = find_progress(job)
    state = together(read_order_state, found) if keeps_order(found) else None
    together(job.order.go_on, progress.epoch, progress.step, state)
    recomputed, notes = preview(job, decoder, attachment)
    say(layout, *notes)
    prepared = Prepared(job, decoder, attachment, recomputed, found, progress, signals, status)
    model = prepared.fill()
    schedule = pretraining_schedule(config, job.order, progress)
    say(layout, *pretraining_notes(config, job.order, schedule, progress))
    prepared.train(model, schedule)
    return model


def _blueprint(config: PretrainConfig, sources: list[Source]) -> Blueprint:
    blueprint = make_blueprint(
        sources,
        llama_type=config.llama_type,
        llama_config=config.llama_config if sources else [{"max_seq_len": config.max_words}, *config.llama_config],
        tokenizer_path=config.tokenizer_path,
        precision=config.precision,
        train=True,
        no_visual=True,
    )
    if config.llama_type not in FAMILIES:
        family = config.llama_type.partition("_")[0]
        raise ConfigError(
            f"--llama_type {config.llama_type}: pretraining trains all weights, on text alone; give --llama_type "
            f"{family}, or use main_finetune.py."
        )
    longest = blueprint.args.longest_document
    if longest is not None and config.max_words > longest:
        raise ConfigError(
            f"--max_words {config.max_words}: the model has positions for {longest} tokens; give no more."
        )
    return blueprint


def _job(config: PretrainConfig, layout: Layout, sources: list[Source], blueprint: Blueprint) -> PretrainJob:
    """Look at the data. Raises on all ranks if one cannot, or if they would train on different data."""
    began = on_main(run_began, config, sources)
    files, held_out = on_main(read_meta, config.data_meta_path, config.data_root, config.packed_data)
    reader = TextReader(config.text_key, config.txt)
    shape = Shape(
        config.max_words, config.batch_size, config.accum_iter, layout.dp_rank, layout.dp_size, config.attend_across
    )
    if config.packed_data:
        order: RowOrder = together(_packed_order, config, blueprint, files, shape)
    else:
        order = _text_order(config, layout, blueprint, files, reader, shape)
    skipped = Skipped(config.max_skipped, lambda said: say(layout, f"validation: {said}"))
    validation = together(_validation, config, blueprint, held_out, reader, skipped)
    say(layout, f"data {config.data_meta_path}: {order.report}", f"validation: {validation.corpus.report}")
    say(layout, *trained_on_too(files, held_out))
    job = PretrainJob(config, layout, sources, blueprint, order, began, validation)
    check_alike({**job.identity, "validation": validation.digest})
    return job


def _text_order(
    config: PretrainConfig,
    layout: Layout,
    blueprint: Blueprint,
    files: list[RawFile],
    reader: TextReader,
    shape: Shape,
) -> TextOrder:
    """The order of raw text, which the main rank has looked at for all."""
    plan = on_main(plan_text, files, reader, blueprint.tokenizer, shape.global_batch, config.seed)
    return together(
        TextOrder,
        plan,
        blueprint.tokenizer,
        shape,
        summed_on_host,
        window=config.shuffle_bytes,
        threads=config.num_workers,
        skipped=Skipped(config.max_skipped, lambda said: tqdm.write(f"[rank {layout.rank}] {said}")),
    )


def _packed_order(config: PretrainConfig, blueprint: Blueprint, files: list[RawFile], shape: Shape) -> PackedOrder:
    opened = [PackedFile.open(file, blueprint.tokenizer) for file in files]
    return PackedOrder(opened, shape, summed_on_host, seed=config.seed, vocabulary=blueprint.args.vocab_size)


def _validation(
    config: PretrainConfig, blueprint: Blueprint, file: RawFile, reader: TextReader, skipped: Skipped
) -> ValidationSet:
    """The validation file's first rows. Raises `DataError`."""
    size, most, tokenizer = config.max_words, config.val_rows, blueprint.tokenizer
    if config.packed_data:
        rows = packed_rows(PackedFile.open(file, tokenizer), size, most, blueprint.args.vocab_size)
    else:
        rows = text_rows(file, reader, tokenizer, size, most, skipped)
    how = {"max_words": size, "val_rows": most, "across": config.attend_across, "tokenizer": tokenizer.fingerprint}
    return whole_set(corpus_of(rows, file, tokenizer, config.attend_across, how))
