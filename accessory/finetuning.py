"""Assembles a fine-tuning run from its configuration: groups, base, method, data, engine."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from accessory import training
from accessory.blueprint import Blueprint, make_blueprint
from accessory.checkpoint.source import Source
from accessory.config import FinetuneConfig
from accessory.data.corpus import build_corpus
from accessory.data.order import GlobalOrder
from accessory.errors import ConfigError
from accessory.eval.mmlu import LONGEST, mmlu_report, read_mmlu
from accessory.meta import MetaModel
from accessory.parallel.agree import check_alike, on_main, together
from accessory.parallel.groups import Layout
from accessory.run.base_cache import check_can_cache, open_base_cache, plan_base_cache
from accessory.run.identity import FinetuneJob
from accessory.run.preview import corpus_notes, preview
from accessory.run.report import Task
from accessory.run.resuming import open_sources, run_began
from accessory.run.schedule import schedule_notes, schedule_of
from accessory.run.signals import StopSignals
from accessory.run.status import RunStatus
from accessory.run.teacher import TeacherPlan, find_teacher, load_teacher, make_teacher
from accessory.run.validation_set import divide
from accessory.training import Prepared, find_progress, say
from accessory.vision.feature_cache import FeatureCache, check_directory

CACHE_DIR = Path("accessory_data_cache")


def finetune(config: FinetuneConfig) -> MetaModel:
    """Run one job from flags to the last checkpoint; returns the trained model, as `training.run` does."""
    return training.run(config, _train)


def _train(config: FinetuneConfig, layout: Layout, signals: StopSignals, status: RunStatus) -> MetaModel:
    config = training.begin(config, layout)
    sources = together(open_sources, config)
    blueprint = together(_blueprint, config, sources)
    chosen = together(find_teacher, config, sources, blueprint)
    decoder, attachment = together(blueprint.build, layout, config.data_parallel)
    decoder.drop_out(config.embed_dropout, config.attn_dropout)
    job = _job(config, layout, sources, blueprint, chosen)
    found, progress = find_progress(job)
    teacher = chosen and together(make_teacher, chosen, decoder, attachment, layout, config.data_parallel)
    recomputed, notes = preview(job, decoder, attachment, teacher)
    say(layout, *notes)
    rows, notes = together(plan_base_cache, job, decoder)
    say(layout, *notes)
    prepared = Prepared(job, decoder, attachment, recomputed, found, progress, signals, status)
    model = prepared.fill()
    if config.cache_features and not config.dry_run:
        model.encoder.cache = together(FeatureCache, config.cache_features, blueprint.vision, decoder)
    model.teacher = teacher and load_teacher(teacher, decoder, layout, config.data_parallel)
    schedule = schedule_of(config, job.order, progress)
    say(layout, *schedule_notes(config, job.order, schedule, progress))
    opened = open_base_cache(rows, job) if rows and not config.dry_run else None
    prepared.train(model, schedule, config.teacher_weight if config.teacher else None, opened)
    if config.cache_features and not config.dry_run:
        cache = model.encoder.cache
        say(layout, f"--cache_features: {cache.hits:,} images of this rank were there, {cache.misses:,} were computed")
    model.teacher = None
    return model


def _job(
    config: FinetuneConfig, layout: Layout, sources: list[Source], blueprint: Blueprint, teacher: TeacherPlan | None
) -> FinetuneJob:
    """Read the data. Raises on all ranks if one cannot, or if they would train on different data."""
    began = on_main(run_began, config, sources)
    how = {
        "max_words": config.max_words,
        "data_dir": config.data_dir,
        "source_max_len": config.source_max_len,
        "target_max_len": config.target_max_len,
        "dialog": config.dialog,
        "mask_history": config.mask_history,
        "train_on_source": config.train_on_source,
        "threads": max(config.num_workers, 1),
        "cache_dir": CACHE_DIR if config.cache_ann_on_disk else None,
        "max_skipped": config.max_skipped,
        "clock": began,
        "pictures": blueprint.vision.place if blueprint.vision else None,
        "image_transform": config.image_transform,
    }
    corpus = together(build_corpus, config.data_config, blueprint.tokenizer, **how)
    say(layout, *together(corpus_notes, config, blueprint, corpus))
    if teacher:
        together(teacher.check_lengths, corpus)
    ids, validation, notes = together(divide, config, blueprint, corpus, how)
    say(layout, *notes)
    order = together(
        GlobalOrder,
        corpus,
        batch_size=config.batch_size,
        accum_iter=config.accum_iter,
        dp_rank=layout.dp_rank,
        dp_size=layout.dp_size,
        seed=config.seed,
        max_tokens=config.max_tokens,
        group_by_length=config.group_by_length,
        share_prefixes=not (blueprint.method.drops_out or config.drops_out),
        ids=ids,
        prompt_weight=config.prompt_loss_weight,
        threads=0 if config.cache_features else config.num_workers,  # what the cache has is not to be read ahead
    )
    tasks = _tasks(config, order)
    job = FinetuneJob(config, layout, sources, blueprint, order, began, validation, tasks, corpus, teacher)
    check_alike({**job.identity, "validation": validation and [validation.digest, *validation.questions]})
    return job


def _tasks(config: FinetuneConfig, order: GlobalOrder) -> tuple[Task, ...]:
    """What the model is given at each evaluation beside documents. Raises on all ranks if one cannot read it."""
    if config.mmlu is None:
        return ()
    items = together(read_mmlu, config.mmlu, config.max_mmlu_samples)
    longest = max(config.max_words, LONGEST)
    return (partial(mmlu_report, items=items, longest=longest, tokens_at_once=max(order.most_tokens, longest)),)


def _blueprint(config: FinetuneConfig, sources: list[Source]) -> Blueprint:
    blueprint = make_blueprint(
        sources,
        llama_type=config.llama_type,
        llama_config=config.llama_config,
        tokenizer_path=config.tokenizer_path,
        quant=config.quant,
        quant_type=config.quant_type if config.quant else None,
        quant_targets=config.quant_targets,
        precision=config.precision,
        train=True,
        new_tokens=config.new_tokens,
        no_visual=config.no_visual,
        flag_settings=config.flag_settings,
    )
    if blueprint.quant_type and not config.only_save_trainable:
        raise ConfigError(
            f"The base is packed as {blueprint.quant_type}, which is never written with the trained part: give "
            "--only_save_trainable."
        )
    if blueprint.vision and config.teacher:
        raise ConfigError(
            "--teacher with an image encoder: a teacher is given tokens alone, and would not see the images. Leave out "
            "--teacher, or the images with --no_visual."
        )
    if config.cache_features:
        if blueprint.vision is None:
            raise ConfigError(
                f"--cache_features {config.cache_features}: the model has no image encoder; leave it out."
            )
        check_directory(config.cache_features)
    if config.drops_out and blueprint.method.keeps_base:
        raise ConfigError(
            "--embed_dropout and --attn_dropout drop what a base computes; with --llama_type "
            f"{blueprint.llama_type} it has no gradient, and would only be made worse. Leave them out."
        )
    check_can_cache(config, blueprint)
    return blueprint
