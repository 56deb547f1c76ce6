"""Assembles a fine-tuning run from its configuration: groups, base, method, data, engine."""

from __future__ import annotations

from contextlib import ExitStack, closing
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import nn

from accessory.blueprint import Blueprint, make_blueprint
from accessory.checkpoint.load import fill, resolve, targets
from accessory.checkpoint.run_record import RUN_FILE, run_record
from accessory.checkpoint.save import CheckpointWriter
from accessory.checkpoint.source import Source
from accessory.checkpoint.training_state import Resumption, WorkingValues, restore_training_state
from accessory.checkpoint.validation_state import ValidationState
from accessory.config import FinetuneConfig, plain
from accessory.data.corpus import build_corpus
from accessory.data.order import GlobalOrder
from accessory.engine import Engine, StepSettings
from accessory.errors import ConfigError
from accessory.eval.mmlu import LONGEST, mmlu_report, read_mmlu
from accessory.kernels.torch_compile import compile_fusible
from accessory.memory.recompute import check_offload, recompute_layers
from accessory.meta import MetaModel
from accessory.method import Attachment
from accessory.model.decoder import Decoder
from accessory.optim import build_optimizer
from accessory.parallel import groups
from accessory.parallel.agree import check_alike, on_main, together
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.parallel.parameters import NamedParameters
from accessory.quant.ahead import unpacking_ahead
from accessory.run.base_cache import check_can_cache, open_base_cache, plan_base_cache
from accessory.run.determinism import algorithms_as_before, fix_order_of_sums, set_cublas_workspace
from accessory.run.identity import Job, progress_at_start, shared_flags
from accessory.run.integer_moves import IntegerMoves
from accessory.run.lock import claim_directory
from accessory.run.preview import corpus_notes, preview, remedies
from accessory.run.report import Reporter, Task
from accessory.run.resuming import find_start, open_sources, run_began
from accessory.run.saving import Saver
from accessory.run.schedule import Schedule, schedule_notes, schedule_of
from accessory.run.signals import StopSignals
from accessory.run.status import RunStatus
from accessory.run.teacher import TeacherPlan, find_teacher, load_teacher, make_teacher
from accessory.run.trackers import make_trackers
from accessory.run.unpacking import chosen_ahead
from accessory.run.validation import Validation
from accessory.run.validation_set import divide

CACHE_DIR = Path("accessory_data_cache")


def finetune(config: FinetuneConfig) -> MetaModel:
    """Run one job from flags to the last checkpoint; returns the trained model, sharded as it was in training.

    How it ends is written to `run_status.json`. Whatever goes wrong is raised as an `AccessoryError` on every rank; its
    `prints` is true on the one rank that prints it.
    """
    with StopSignals() as signals, ExitStack() as held:
        held.enter_context(algorithms_as_before())
        if config.deterministic and config.device != "cpu":
            set_cublas_workspace()
        layout = groups.start(config.device, config.model_parallel_size, config.dist_on_itp)
        output_dir = None if config.dry_run else config.output_dir
        on_main(claim_directory, output_dir, held)
        status = RunStatus(output_dir, layout.world_size, layout.is_main)
        held.enter_context(groups.when_lost(status.end))
        try:
            model = _train(config, layout, signals, status)
        except Exception as error:
            fault = groups.root_cause(error)
            status.end(fault)
            raise fault from None  # `root_cause` has printed the traceback of any other exception
        status.end(None)
        return model


def _train(config: FinetuneConfig, layout: Layout, signals: StopSignals, status: RunStatus) -> MetaModel:
    together(config.check)
    check_alike(shared_flags(config))
    torch.manual_seed(config.seed + layout.dp_rank)  # ranks that share a model draw the same dropout
    compile_fusible(config.compile)
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    _say(layout, *fix_order_of_sums(config.deterministic, layout.device))
    together(check_offload, config.offload_inputs, layout.device)
    start, notes = on_main(find_start, config)
    _say(layout, *notes)
    config = config.model_copy(update={"resume": start})
    sources = together(open_sources, config)
    blueprint = together(_blueprint, config, sources)
    chosen = together(find_teacher, config, sources, blueprint)
    decoder, attachment = together(blueprint.build, layout, config.data_parallel)
    decoder.drop_out(config.embed_dropout, config.attn_dropout)
    job = _job(config, layout, sources, blueprint, chosen)
    found = together(job.resumption)
    progress, notes = progress_at_start(found)
    _say(layout, *notes)
    teacher = chosen and together(make_teacher, chosen, decoder, attachment, layout, config.data_parallel)
    recomputed, notes = preview(job, decoder, attachment, teacher)
    _say(layout, *notes)
    rows, notes = together(plan_base_cache, job, decoder)
    _say(layout, *notes)
    slicings = {target.name: target.slicing for target in targets(decoder)}
    model = _fill(job, decoder, attachment)
    model.teacher = teacher and load_teacher(teacher, decoder, layout, config.data_parallel)
    for block in decoder.layers if layout.world_size > 1 else ():
        block.register_forward_pre_hook(groups.tick)
        block.register_forward_hook(groups.tick_in_backward)
    recompute_layers(decoder, recomputed, offload=config.offload_inputs, device=layout.device)
    ahead, notes = chosen_ahead(decoder, job.order.most_tokens)
    _say(layout, *notes)
    everything = NamedParameters(dict(decoder.named_parameters()), slicings | attachment.working)
    parameters = everything.only(attachment.trainable)
    weights = NamedParameters(everything.only(everything.keys() - attachment.working.keys()), slicings)
    rates = blueprint.method.rates(decoder, config.lr)
    optimizer = build_optimizer(config.optim, parameters, config.lr, config.weight_decay, config.adam_beta2, rates)
    rule = blueprint.method.integer_rule
    moves = IntegerMoves(decoder, rule, layout) if rule else None
    working = moves.working if moves else None
    if found:
        together(restore_training_state, found, optimizer, parameters, layout, working)
    schedule = schedule_of(config, job.order, progress)
    _say(layout, *schedule_notes(config, job.order, schedule, progress))
    together(status.begin, progress.total_steps)
    reporter = together(_reporter, config, layout, schedule.total_steps(progress), progress.total_steps)
    with closing(reporter), unpacking_ahead(ahead), ExitStack() as held:
        if rows and not config.dry_run:
            model.base_cache = held.enter_context(open_base_cache(rows, job))
        changed = weights.only(attachment.trainable | attachment.moved)
        saver = None
        if status.output_dir:
            saver = _saver(job, weights, changed, parameters, working, optimizer, reporter, status)
        validation = _validation(job, model, schedule, reporter, signals, found)
        if saver and validation:
            saver.validation = validation.state
            _say(layout, *saver.point_at_best())
        settings = StepSettings(
            scales_loss=config.precision == "fp16",
            pin_memory=config.pin_mem and layout.device.type == "cuda",
            skip_not_finite=config.not_finite == "skip",
            memory_remedies=remedies(config),
            teacher_weight=config.teacher_weight if config.teacher else None,
        )
        engine = Engine(
            model,
            parameters,
            optimizer,
            job.order,
            schedule,
            settings,
            reporter,
            saver,
            signals,
            model.base_cache,
            validation,
            moves,
        )
        groups.limit_waiting(timedelta(seconds=config.timeout))
        signals.deferring = True
        engine.train(progress)
    model.base_cache = None  # it knows documents of this corpus only
    model.teacher = None
    if config.dry_run:
        _say(layout, "dry run: all is well, nothing was written")
    return model


def _job(
    config: FinetuneConfig, layout: Layout, sources: list[Source], blueprint: Blueprint, teacher: TeacherPlan | None
) -> Job:
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
    }
    corpus = together(build_corpus, config.data_config, blueprint.tokenizer, **how)
    _say(layout, *together(corpus_notes, config, blueprint, corpus))
    if teacher:
        together(teacher.check_lengths, corpus)
    ids, validation, notes = together(divide, config, blueprint, corpus, how)
    _say(layout, *notes)
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
    )
    job = Job(config, layout, sources, blueprint, corpus, order, began, validation, _tasks(config, order), teacher)
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
    if config.cache_features and blueprint.vision is None:
        raise ConfigError(f"--cache_features {config.cache_features}: the model has no image encoder; leave it out.")
    if config.drops_out and blueprint.method.keeps_base:
        raise ConfigError(
            "--embed_dropout and --attn_dropout drop what a base computes; with --llama_type "
            f"{blueprint.llama_type} it has no gradient, and would only be made worse. Leave them out."
        )
    check_can_cache(config, blueprint)
    return blueprint


def _fill(job: Job, decoder: Decoder, attachment: Attachment) -> MetaModel:
    """Read, quantize and shard the weights, block by block."""
    config, layout, blueprint = job.config, job.layout, job.blueprint
    tensors = together(resolve, decoder, job.sources, attachment, initialize=config.resume is None)
    data_parallel = DataParallel(layout, config.data_parallel, blueprint.method.trains_base)
    together(fill, decoder, tensors, attachment, layout, data_parallel, config.seed)
    layouts = tuple(job.corpus.documents_by_prompt_layout())
    model = MetaModel(decoder, blueprint.tokenizer, config.max_words, layouts, job.corpus.told.system)
    model.see(blueprint.vision, divides=layout.mp_size > 1, threads=config.num_workers)
    data_parallel.shard_root(model, also=("token_scores", "generate"), whole=_encoder_parameters(blueprint, decoder))
    return model


def _encoder_parameters(blueprint: Blueprint, decoder: Decoder) -> set[nn.Parameter]:
    """Of an image encoder, which is frozen: it lies whole on each rank, and not all may have a picture at a time."""
    return set(getattr(decoder, blueprint.vision.encoder).parameters()) if blueprint.vision else set()


def _reporter(config: FinetuneConfig, layout: Layout, total_steps: int, first_step: int) -> Reporter:
    """Shows and records the run; writes nothing on other ranks than the main one, and in a dry run."""
    where, trackers = None if config.dry_run else config.output_dir, []
    if where and layout.is_main:
        trackers = make_trackers(config.report_to, where, first_step + 1 if first_step else 0, plain(config))
    return Reporter(where, total_steps, first_step, layout.is_main, trackers)


def _validation(
    job: Job,
    model: MetaModel,
    schedule: Schedule,
    reporter: Reporter,
    signals: StopSignals,
    found: Resumption | None,
) -> Validation | None:
    """What evaluates the model, if that is wanted; it goes on from what the resumed run had found."""
    chosen, config = job.validation, job.config
    if chosen is None:
        return None
    state = found.validation if found else None
    if state and state.documents != chosen.digest:
        reporter.say("validation is on other documents than before: best loss and patience begin anew")
        state = None
    return Validation(
        model=model,
        order=chosen.order(job.layout, job.order.most_tokens),
        sources=chosen.sources,
        schedule=schedule,
        state=state or ValidationState(chosen.digest),
        reporter=reporter,
        signals=signals,
        device=job.layout.device,
        questions=chosen.questions,
        answer_tokens=config.sample_tokens,
        patience=config.patience,
        tasks=job.tasks,
        memory_remedies=remedies(config),
    )


def _saver(
    job: Job,
    weights: NamedParameters,
    changed: NamedParameters,
    parameters: NamedParameters,
    working: WorkingValues | None,
    optimizer: torch.optim.Optimizer,
    reporter: Reporter,
    status: RunStatus,
) -> Saver:
    """The engine's saver, of all `weights` or of those that are `changed`.

    Raises `DiskFullError` if a checkpoint does not fit on the disk.
    """
    config, blueprint, corpus = job.config, job.blueprint, job.corpus
    layouts = corpus.documents_by_prompt_layout()
    documents = {
        "config.json": blueprint.settings(),
        "meta.json": {"llama_type": blueprint.llama_type},
        RUN_FILE: run_record(
            plain(config), job.base, blueprint.quant_type, corpus.fingerprint, layouts, job.began, corpus.told.system
        ),
    }
    only_trainable = config.only_save_trainable and len(changed) < len(weights.slicings)
    stem = "trainable" if only_trainable else "model"
    saver = Saver(
        writer=CheckpointWriter(status.output_dir, stem, documents, blueprint.tokenizer),
        weights=changed if only_trainable else weights,
        trained=parameters,
        optimizer=optimizer,
        identity=job.identity,
        conditions=job.conditions,
        layout=job.layout,
        reporter=reporter,
        status=status,
        keep_last=config.keep_last,
        working=working,
    )
    saver.check_disk_space()
    return saver


def _say(layout: Layout, *texts: str) -> None:
    if layout.is_main and texts:
        print("\n".join(texts), flush=True)
