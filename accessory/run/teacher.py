"""`--teacher`: which model teaches is worked out and checked before any weight is read; then it is loaded, frozen."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from accessory.blueprint import Blueprint, make_blueprint, tokenizer_place
from accessory.checkpoint.exchange import hand_on, in_common
from accessory.checkpoint.lazy import first_rows
from accessory.checkpoint.load import VOCABULARY_MATRICES, fill, resolve
from accessory.checkpoint.run_record import with_base
from accessory.checkpoint.source import Source
from accessory.config import FinetuneConfig
from accessory.data.corpus import Corpus
from accessory.errors import AccessoryError, ConfigError, DataError, TokenizerError
from accessory.method import METHODS, Attachment
from accessory.model.decoder import Decoder
from accessory.model.families import architecture_of
from accessory.model.teacher import Teacher
from accessory.parallel.agree import together
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.tokenizer import StatedTokenizer, open_tokenizer, same_tokenizer


@dataclass(frozen=True)
class TeacherPlan:
    """A teacher that can be loaded.

    named: as the user did. vocabulary: tokens that student and teacher both have rows for. trained: names of tensors
    that the student does not have from the base; None: the teacher is another model. notes: lines for the log.
    """

    named: str
    sources: list[Source]
    blueprint: Blueprint
    vocabulary: int
    weight: float
    temperature: float
    trained: frozenset[str] | None = None
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed."""
        return {
            "model": [source.fingerprint()[:16] for source in self.sources],
            "quantization": self.blueprint.quant_type,
            "weight": self.weight,
            "temperature": self.temperature,
        }

    def check_lengths(self, corpus: Corpus) -> None:
        """Raise `DataError` for a document that is longer than the teacher's positions reach."""
        try:
            corpus.check_lengths(self.blueprint.args.longest_document, None)
        except DataError as error:
            raise DataError(f"--teacher {self.named}: {error}") from error


@dataclass(frozen=True)
class MadeTeacher:
    """A teacher on the meta device. shared: names of the parameters that it will have from the student."""

    plan: TeacherPlan
    decoder: Decoder
    attachment: Attachment
    shared: Set[str]

    def lines(self) -> list[str]:
        """What to tell the user."""
        plan, sizes = self.plan, {name: p.nbytes for name, p in self.decoder.named_parameters()}
        stored = plan.blueprint.quant_type or "full precision"
        said = f"teacher {plan.named}: {plan.blueprint.llama_type}, weights in {stored}; its divergence is "
        said += f"{plan.weight:g} of the loss, at a temperature of {plan.temperature:g}"
        if self.shared:
            shared = sum(sizes[name] for name in self.shared)
            said += f"; {shared / 1e9:.3f} of {sum(sizes.values()) / 1e9:.3f} GB are the student's own frozen weights"
        return [said, *plan.notes]


def find_teacher(config: FinetuneConfig, sources: list[Source], blueprint: Blueprint) -> TeacherPlan | None:
    """The teacher that `config` names for a student of `sources` and `blueprint`, if any.

    Raises an `AccessoryError` that names the flag where it cannot be opened, or has another vocabulary.
    """
    if not config.teacher:
        return None
    named = " ".join(map(str, config.teacher))
    try:
        found = _own_base(config, sources, blueprint) if config.teaches_base else _another(config, sources, blueprint)
    except AccessoryError as error:
        raise type(error)(f"--teacher {named}: {error}") from error
    theirs, notes = found
    rows, wanted = theirs[1].args.vocab_size, blueprint.args.vocab_size
    trained = None
    if config.teaches_base and theirs[1].quant_type is None:
        parts = (s for s in sources if s.is_delta or s.is_difference or s.path == config.resume)
        trained = frozenset(name for part in parts for name in part.tensors)
    return TeacherPlan(
        named=named,
        sources=[_with_rows(source, wanted) for source in theirs[0]] if rows > wanted else theirs[0],
        # Ranks hold the same rows of both heads.
        blueprint=replace(theirs[1], args=theirs[1].args.model_copy(update={"vocab_size": wanted})),
        vocabulary=min(rows, wanted),
        weight=config.teacher_weight,
        temperature=config.teacher_temperature,
        trained=trained,
        notes=notes,
    )


def make_teacher(
    plan: TeacherPlan, student: Decoder, attachment: Attachment, layout: Layout, data_parallel: str
) -> MadeTeacher:
    """The teacher on the meta device; `student`, with its `attachment`, may still be there, too.

    Where nothing is sharded, what the base's teacher and the student hold alike and frozen is there once. Raises an
    `AccessoryError` where the teacher cannot be laid out so.
    """
    try:
        decoder, own = plan.blueprint.build(layout)
    except AccessoryError as error:
        raise type(error)(f"--teacher {plan.named}: {error}") from error
    if plan.trained is None or (data_parallel == "fsdp" and layout.dp_size > 1):
        return MadeTeacher(plan, decoder, own, frozenset())
    return MadeTeacher(plan, decoder, own, in_common(student, decoder, plan.trained | attachment.trainable))


def load_teacher(made: MadeTeacher, student: Decoder, layout: Layout, data_parallel: str) -> Teacher:
    """Read it, beside a student that is filled. A collective. Raises `CheckpointError` where its files do not fit."""
    plan, decoder = made.plan, made.decoder
    everything = {name for name, _ in decoder.named_parameters()}
    there = hand_on(student, decoder, everything - made.shared) if made.shared else set()
    tensors = together(resolve, decoder, plan.sources, made.attachment, initialize=False)
    sharding = DataParallel(layout, data_parallel, base_is_trained=False)
    together(fill, decoder, tensors, made.attachment, layout, sharding, there=there)
    decoder.requires_grad_(False).eval()
    return Teacher(decoder, plan.vocabulary, plan.weight, plan.temperature)


def _own_base(
    config: FinetuneConfig, sources: list[Source], blueprint: Blueprint
) -> tuple[tuple[list[Source], Blueprint], tuple[str, ...]]:
    """The run's base, plain: its whole models, without the parts that were trained beside them."""
    base = [s for s in sources if s.path != config.resume and not (s.is_delta or s.is_difference)]
    if packed := next((source for source in base if source.storage), None):
        raise ConfigError(
            f"{packed.path} is packed as {packed.storage_names} already, and holds no weights in full precision. Give "
            "the directory it was packed from: --teacher DIR."
        )
    _check_tokens(config, sources, blueprint, base)
    family = architecture_of(blueprint.args.architecture, "architecture").family
    full = METHODS["full"]
    plain = replace(
        blueprint,
        llama_type=f"{family}{full.suffix}",
        method=full(full.Settings()),
        quant_type=config.teacher_quant_type,
        train=False,
        plain=frozenset(),
        storages={},
        notes=(),
        quant_targets=(),
    )
    return (base, plain), ()


def _another(
    config: FinetuneConfig, sources: list[Source], blueprint: Blueprint
) -> tuple[tuple[list[Source], Blueprint], tuple[str, ...]]:
    """Any checkpoint, as its files say it was trained and packed."""
    theirs = with_base(list(config.teacher), no_visual=True)
    llama_type = next((s.llama_type for s in reversed(theirs) if s.llama_type), None)
    name = next((s.settings.get("architecture") for s in theirs if s.settings), None)
    if llama_type is None and name is not None:
        llama_type = architecture_of(name, str(theirs[0].path)).family
    recorded = next((s.run["quantization"] for s in reversed(theirs) if s.run), None)
    asked = config.teacher_quant_type or recorded
    place = tokenizer_place(theirs)
    notes = () if place else ("the teacher's files hold no tokenizer: it is taken to have the student's",)
    made = make_blueprint(
        theirs,
        precision=config.precision,
        train=False,
        no_visual=True,
        llama_type=llama_type,
        quant=asked is not None,
        quant_type=asked,
        tokenizer_path=None if place else theirs[0].path,
        opener=(lambda _: blueprint.tokenizer) if place is None else open_tokenizer,
    )
    if place:
        _check_tokens(config, sources, blueprint, theirs, made.tokenizer)
    return (theirs, made), notes


def _check_tokens(
    config: FinetuneConfig,
    sources: list[Source],
    blueprint: Blueprint,
    theirs: list[Source],
    opened: StatedTokenizer | None = None,
) -> None:
    """Raise `TokenizerError` where the tokens of the student are not those of the teacher, which `theirs` hold."""
    own, other = config.tokenizer_path or tokenizer_place(sources), tokenizer_place(theirs)
    same = other is None or (own is not None and same_tokenizer(own, other))
    if same and not config.new_tokens:
        return
    mine = blueprint.tokenizer
    yours = opened or (open_tokenizer(other) if other else open_tokenizer(own))
    if mine.fingerprint == yours.fingerprint:
        return
    for index in range(mine.vocab_size):
        token, taught = mine.token(index), yours.token(index) if index < yours.vocab_size else None
        if token is not None and token != taught:
            found = "which has no such token" if taught is None else f"where it is {taught!r}"
            raise TokenizerError(
                f"Token {index} is {token!r} in the student's vocabulary ({mine.source}), but not in the teacher's "
                f"({yours.source}), {found}. Give a teacher of the same vocabulary; it cannot teach --new_tokens."
            )


def _with_rows(source: Source, rows: int) -> Source:
    """A source whose embedding and head have only the first `rows` rows: those behind belong to no token."""
    cut = {name: first_rows(source.tensors[name], rows) for name in VOCABULARY_MATRICES if name in source.tensors}
    return replace(source, tensors=source.tensors | cut)
