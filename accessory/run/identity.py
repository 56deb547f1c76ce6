"""A run's identity, which must be equal for it to be resumed, and conditions, for it to go on bit for bit."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from accessory import kernels
from accessory.blueprint import Blueprint
from accessory.checkpoint.source import Source
from accessory.checkpoint.training_state import FIRST_LOSS_SCALE, Progress, Resumption, find_resumption
from accessory.config import FinetuneConfig, PretrainConfig, RunConfig, plain
from accessory.data.corpus import Corpus
from accessory.data.order import GlobalOrder, Order
from accessory.data.raw.order import RowOrder
from accessory.parallel.groups import Layout
from accessory.run.report import Task
from accessory.run.teacher import TeacherPlan
from accessory.run.validation_set import ValidationSet

_SCHEDULE = (
    "precision", "lr", "min_lr", "lr_schedule", "warmup_epochs", "epochs", "weight_decay", "adam_beta2", "clip_grad",
    "prompt_loss_weight", "quant_targets", "embed_dropout", "attn_dropout",
)  # fmt: skip
"""Flags that set what a step does, or how long a run is."""
_PRETRAINING = (
    "precision", "lr", "min_lr", "warmup_iters", "lr_decay_iters", "epochs", "weight_decay", "adam_beta2", "clip_grad",
)  # fmt: skip
"""The same of pretraining."""
_PLACES = (
    "pretrained_path", "llama_config", "tokenizer_path", "data_config", "data_dir", "val_data", "output_dir", "resume",
    "cache_base", "teacher", "vision_path", "cache_features",
)  # fmt: skip
"""Flags that may differ from node to node: what lies there is compared instead."""
_ORDER = frozenset(("data", "val_split", "seed", "global_batch", "group_by_length"))
"""The parts of the identity that the order of documents depends on."""
_SCALED = frozenset(("precision", "base", "quantization", "data", "teacher"))
"""The parts of the identity that the size of gradients depends on, and so fp16's loss scale."""


def shared_flags(config: RunConfig) -> dict[str, Any]:
    """The flags that all processes of a run must be given alike."""
    return {name: value for name, value in plain(config).items() if name not in _PLACES}


@dataclass(frozen=True)
class Job(ABC):
    """A run that is ready to read weights: what is trained, and on what.

    began: when it was first started. tasks: given to the model at each evaluation.
    """

    config: RunConfig
    layout: Layout
    sources: list[Source]
    blueprint: Blueprint
    order: Order
    began: datetime
    validation: ValidationSet | None = None
    tasks: tuple[Task, ...] = ()

    system: ClassVar[str | None] = None
    """The system's words before most conversations of the data."""
    prompt_layouts: ClassVar[Mapping[str, int]] = MappingProxyType({})
    """Layout of a question -> number of documents that have it, the one with most first."""
    saves_only_changed: ClassVar[bool] = False
    """Whether a checkpoint holds only what is trained."""
    _follows: ClassVar[Mapping[str, str]]
    """Flag -> the flag from which its value follows if it is not given."""
    _rounding: ClassVar[tuple[str, ...]]
    """Flags that change how sums are rounded."""

    @property
    def base(self) -> list[Source]:
        """What `--pretrained_path` names: `sources` without the checkpoint that is resumed."""
        return [source for source in self.sources if source.path != self.config.resume]

    @property
    @abstractmethod
    def data_fingerprint(self) -> str:
        """Of all that determines the training data."""

    @property
    def accumulates(self) -> bool:
        """Whether a step may have several micro-batches."""
        return self.config.accum_iter > 1

    @property
    def pictures(self) -> int:
        """The most that a micro-batch can have."""
        return 0

    @property
    @abstractmethod
    def smallest_step(self) -> dict[str, int]:
        """Flags by which a micro-batch is as small as can be, and their values; none if it is so already."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed."""
        return {
            "llama_type": self.blueprint.llama_type,
            "settings": self.blueprint.method.settings.model_dump(),
            "base": [source.fingerprint()[:16] for source in self.base],
            "seed": self.config.seed,
            "global_batch": self.order.global_batch,
            "optim": self.config.optim,
            **self._own_identity(),
        }

    @abstractmethod
    def _own_identity(self) -> dict[str, Any]:
        """The rest of the identity, the data among it."""

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """What must be equal for a resumed run to go on bit for bit: all that changes how sums are rounded."""
        return {
            "world_size": self.layout.world_size,
            "mp_size": self.layout.mp_size,
            "device": self.layout.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "kernels": kernels.computing(self.layout.device, self.blueprint.dtype),
            "deterministic": self.config.deterministic if self.layout.device.type == "cuda" else None,
            **{name: getattr(self.config, name) for name in self._rounding},
        }

    def on_other_data(self, progress: Progress) -> tuple[Progress, list[str]]:
        """(where a run goes on if the documents have another order than those up to `progress`; lines about it)."""
        if not progress.step:
            return progress, []
        said = f"the documents of epoch {progress.epoch} are other ones now: it begins anew"
        return replace(progress, step=0), [said]

    def resumption(self) -> Resumption | None:
        """What `--resume` says to go on from, if anything. Raises `CheckpointError` where it is another run's."""
        config = self.config
        if config.resume is None:
            return None
        follows = {name: of for name, of in self._follows.items() if name not in config.model_fields_set}
        return find_resumption(config.resume, self.identity, self.conditions, config.allow_changed, follows)


@dataclass(frozen=True)
class FinetuneJob(Job):
    """The same for fine-tuning, on the documents of `corpus`."""

    config: FinetuneConfig
    order: GlobalOrder
    corpus: Corpus | None = None
    teacher: TeacherPlan | None = None

    _follows: ClassVar[Mapping[str, str]] = MappingProxyType({"min_lr": "lr", "warmup_epochs": "epochs"})
    _rounding: ClassVar[tuple[str, ...]] = ("data_parallel", "batch_size", "accum_iter", "max_tokens")

    @property
    def data_fingerprint(self) -> str:
        """That of the corpus."""
        return self.corpus.fingerprint

    @cached_property
    def prompt_layouts(self) -> dict[str, int]:
        """As the corpus has them."""
        return self.corpus.documents_by_prompt_layout()

    @property
    def system(self) -> str | None:
        """As the corpus was told."""
        return self.corpus.told.system

    @property
    def saves_only_changed(self) -> bool:
        """As the flag."""
        return self.config.only_save_trainable

    @property
    def accumulates(self) -> bool:
        """With `--max_tokens`, whatever the other flags are."""
        return super().accumulates or self.config.max_tokens is not None

    @property
    def pictures(self) -> int:
        """One of each document."""
        if self.blueprint.vision is None:
            return 0
        documents = self.config.batch_size if self.config.max_tokens is None else self.order.global_batch
        return min(documents, self.order.most_tokens // max(self.blueprint.vision.place.rows, 1))

    @property
    def smallest_step(self) -> dict[str, int]:
        """`--max_tokens` of the longest document there may be."""
        longest = min(self.config.max_words, self.order.most_tokens)
        return {"max_tokens": longest} if longest < self.order.most_tokens else {}

    def _own_identity(self) -> dict[str, Any]:
        return {
            "data": self.corpus.identity,
            "val_split": self.config.val_split,
            "group_by_length": self.config.group_by_length,
            "quantization": self.blueprint.quant_type,
            "teacher": self.teacher and self.teacher.identity,
            **{name: getattr(self.config, name) for name in _SCHEDULE},
        }

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """Those of every run, and how the base's states are kept."""
        rows = self.config.cache_base_rows if self.config.cache_base else None
        return {**super().conditions, "cached_rows": rows}


@dataclass(frozen=True)
class PretrainJob(Job):
    """The same for pretraining, on rows of raw text."""

    config: PretrainConfig
    order: RowOrder

    _follows: ClassVar[Mapping[str, str]] = MappingProxyType({"min_lr": "lr"})
    _rounding: ClassVar[tuple[str, ...]] = ("data_parallel", "batch_size", "accum_iter")

    @property
    def data_fingerprint(self) -> str:
        """Of the order's identity."""
        return hashlib.sha256(json.dumps(self.order.identity, sort_keys=True).encode()).hexdigest()

    @property
    def smallest_step(self) -> dict[str, int]:
        """A row at a time."""
        return {"batch_size": 1} if self.config.batch_size > 1 else {}

    def on_other_data(self, progress: Progress) -> tuple[Progress, list[str]]:
        """After as many steps, by which the learning rate goes, whatever a pass over the data has now."""
        epoch, step = divmod(progress.total_steps, self.order.steps_per_epoch)
        said = "the rows are other ones now: a pass over them begins"
        if epoch >= self.config.epochs:
            said = (
                f"the rows are other ones now, and the {progress.total_steps:,} steps that were taken are {epoch:,} "
                f"passes over them: nothing is left to train, give more than --epochs {self.config.epochs}"
            )
        return replace(progress, epoch=epoch, step=step), [said]

    def _own_identity(self) -> dict[str, Any]:
        return {"data": self.order.identity, **{name: getattr(self.config, name) for name in _PRETRAINING}}


def keeps_order(found: Resumption | None) -> bool:
    """Whether a resumed run goes on in the midst of the data where the saved one stood."""
    return found is not None and not _ORDER.intersection(found.changed)


def progress_at_start(job: Job, found: Resumption | None) -> tuple[Progress, list[str]]:
    """Where the run begins, and what to tell the user about it. The loss scale begins anew if gradients have others."""
    if found is None:
        return Progress(), []
    progress, notes = found.progress, [f"resuming {found.directory} after step {found.progress.total_steps}"]
    if found.inexact:
        notes.append(f"not bit for bit: {'; '.join(found.inexact)}")
    if found.changed:
        notes.append(f"changed, as --allow_changed says: {', '.join(found.changed)}")
    if _SCALED.intersection(found.changed):
        progress = replace(progress, loss_scale=FIRST_LOSS_SCALE, good_steps=0)
    if not keeps_order(found):
        progress, said = job.on_other_data(progress)
        notes += said
    return progress, notes
