"""What every training run does, whatever it is trained on: its life around the work, weights, optimizer, engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

from accessory.checkpoint.load import fill, resolve, targets
from accessory.checkpoint.run_record import RUN_FILE, run_record
from accessory.checkpoint.save import CheckpointWriter
from accessory.checkpoint.training_state import Progress, Resumption, WorkingValues, restore_training_state
from accessory.checkpoint.validation_state import ValidationState
from accessory.config import RunConfig, plain
from accessory.engine import Engine, StepSettings
from accessory.kernels.torch_compile import compile_fusible
from accessory.memory.base_cache import BaseCache
from accessory.memory.recompute import check_offload, recompute_layers
from accessory.memory.vision import VisionMemory
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
from accessory.run.determinism import algorithms_as_before, fix_order_of_sums, set_cublas_workspace
from accessory.run.identity import Job, progress_at_start, shared_flags
from accessory.run.integer_moves import IntegerMoves
from accessory.run.lock import claim_directory
from accessory.run.report import Reporter
from accessory.run.resuming import find_start
from accessory.run.saving import Saver
from accessory.run.schedule import Schedule
from accessory.run.signals import StopSignals
from accessory.run.status import RunStatus
from accessory.run.trackers import make_trackers
from accessory.run.unpacking import chosen_ahead
from accessory.run.validation import Validation

Config = TypeVar("Config", bound=RunConfig)
Work = Callable[[Config, Layout, StopSignals, RunStatus], MetaModel]
"""What a run does, from its flags to the trained model."""


def run(config: Config, work: Work) -> MetaModel:
    """Do the `work` of one run; returns the trained model, sharded as it was in training.

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
            model = work(config, layout, signals, status)
        except Exception as error:
            fault = groups.root_cause(error)
            status.end(fault)
            raise fault from None  # `root_cause` has printed the traceback of any other exception
        status.end(None)
        return model


def begin(config: Config, layout: Layout) -> Config:
    """Check the flags and set up the processes; returns the flags with the checkpoint to resume from, if any."""
    together(config.check)
    check_alike(shared_flags(config))
    torch.manual_seed(config.seed + layout.dp_rank)  # ranks that share a model draw the same dropout
    compile_fusible(config.compile)
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    say(layout, *fix_order_of_sums(config.deterministic, layout.device))
    together(check_offload, config.offload_inputs, layout.device)
    start, notes = on_main(find_start, config)
    say(layout, *notes)
    return config.model_copy(update={"resume": start})


def find_progress(job: Job) -> tuple[Resumption | None, Progress]:
    """(what the run goes on from, if anything; where it begins)."""
    found = together(job.resumption)
    progress, notes = progress_at_start(job, found)
    say(job.layout, *notes)
    return found, progress


@dataclass
class Prepared:
    """A run whose decoder is made, on meta, and has no weights yet. recomputed: layers to recompute in the backward."""

    job: Job
    decoder: Decoder
    attachment: Attachment
    recomputed: int
    found: Resumption | None
    progress: Progress
    signals: StopSignals
    status: RunStatus

    def __post_init__(self) -> None:
        self.slicings = {target.name: target.slicing for target in targets(self.decoder)}

    def fill(self) -> MetaModel:
        """Read, quantize and shard the weights, block by block."""
        job, decoder, attachment = self.job, self.decoder, self.attachment
        config, layout, blueprint = job.config, job.layout, job.blueprint
        tensors = together(resolve, decoder, job.sources, attachment, initialize=config.resume is None)
        data_parallel = DataParallel(layout, config.data_parallel, blueprint.method.trains_base)
        together(fill, decoder, tensors, attachment, layout, data_parallel, config.seed)
        model = MetaModel(decoder, blueprint.tokenizer, config.max_words, tuple(job.prompt_layouts), job.system)
        if vision := blueprint.vision:
            memory = VisionMemory(decoder, vision, attachment, layout, job.pictures)
            model.see(vision, divides=memory.divides, threads=config.num_workers)
        # Not all ranks may have a picture at a time, so that the encoder, which is frozen, is not to be gathered.
        whole = frozenset(getattr(decoder, vision.encoder).parameters() if vision else ())
        data_parallel.shard_root(model, also=("token_scores", "generate"), whole=whole)
        return model

    def train(
        self,
        model: MetaModel,
        schedule: Schedule,
        teacher_weight: float | None = None,
        base_cache: AbstractContextManager[BaseCache | None] | None = None,
    ) -> None:
        """Train the filled `model` to the end of the `schedule`, as `Engine.train` does.

        teacher_weight: of `StepSettings`. base_cache: opens what the engine takes its base's states from.
        """
        job, decoder, attachment, progress = self.job, self.decoder, self.attachment, self.progress
        config, layout, blueprint = job.config, job.layout, job.blueprint
        for block in decoder.layers if layout.world_size > 1 else ():
            block.register_forward_pre_hook(groups.tick)
            block.register_forward_hook(groups.tick_in_backward)
        recompute_layers(decoder, self.recomputed, offload=config.offload_inputs, device=layout.device)
        ahead, notes = chosen_ahead(decoder, job.order.most_tokens)
        say(layout, *notes)
        everything = NamedParameters(dict(decoder.named_parameters()), self.slicings | attachment.working)
        parameters = everything.only(attachment.trainable)
        weights = NamedParameters(everything.only(everything.keys() - attachment.working.keys()), self.slicings)
        rates = blueprint.method.rates(decoder, config.lr)
        optimizer = build_optimizer(config.optim, parameters, config.lr, config.weight_decay, config.adam_beta2, rates)
        rule = blueprint.method.integer_rule
        moves = IntegerMoves(decoder, rule, layout) if rule else None
        working = moves.working if moves else None
        if self.found:
            together(restore_training_state, self.found, optimizer, parameters, layout, working)
        together(self.status.begin, progress.total_steps)
        reporter = together(_reporter, config, layout, schedule.total_steps(progress), progress.total_steps)
        with closing(reporter), unpacking_ahead(ahead), ExitStack() as held:
            model.base_cache = held.enter_context(base_cache or nullcontext())
            changed = weights.only(attachment.trainable | attachment.moved)
            saver = None
            if self.status.output_dir:
                saver = _saver(job, weights, changed, parameters, working, optimizer, reporter, self.status)
            validation = self._validation(model, schedule, reporter)
            if saver and validation:
                saver.validation = validation.state
                say(layout, *saver.point_at_best())
            settings = StepSettings(
                scales_loss=config.precision == "fp16",
                pin_memory=config.pin_mem and layout.device.type == "cuda",
                skip_not_finite=config.not_finite == "skip",
                memory_remedies=config.remedies,
                teacher_weight=teacher_weight,
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
                self.signals,
                model.base_cache,
                validation,
                moves,
            )
            groups.limit_waiting(timedelta(seconds=config.timeout))
            self.signals.deferring = True
            engine.train(progress)
        model.base_cache = None  # it knows documents of this data only
        if config.dry_run:
            say(layout, "dry run: all is well, nothing was written")

    def _validation(self, model: MetaModel, schedule: Schedule, reporter: Reporter) -> Validation | None:
        """What evaluates the model, if that is wanted; it goes on from what the resumed run had found."""
        job, chosen = self.job, self.job.validation
        if chosen is None:
            return None
        state = self.found.validation if self.found else None
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
            signals=self.signals,
            device=job.layout.device,
            questions=chosen.questions,
            answer_tokens=chosen.answer_tokens,
            patience=job.config.patience,
            tasks=job.tasks,
            memory_remedies=job.config.remedies,
        )


def _reporter(config: RunConfig, layout: Layout, total_steps: int, first_step: int) -> Reporter:
    """Shows and records the run; writes nothing on other ranks than the main one, and in a dry run."""
    where, trackers = None if config.dry_run else config.output_dir, []
    if where and layout.is_main:
        trackers = make_trackers(config.report_to, where, first_step + 1 if first_step else 0, plain(config))
    return Reporter(where, total_steps, first_step, layout.is_main, trackers)


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
    config, blueprint = job.config, job.blueprint
    documents = {
        "config.json": blueprint.settings(),
        "meta.json": {"llama_type": blueprint.llama_type},
        RUN_FILE: run_record(
            plain(config), job.base, blueprint.quant_type, job.data_fingerprint, job.prompt_layouts, job.began,
            job.system,
        ),
    }  # fmt: skip
    only_trainable = job.saves_only_changed and len(changed) < len(weights.slicings)
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
        order=job.order,
        keep_last=config.keep_last,
        working=working,
    )
    saver.check_disk_space()
    return saver


def say(layout: Layout, *texts: str) -> None:
    """Print lines on the main rank."""
    if layout.is_main and texts:
        print("\n".join(texts), flush=True)
