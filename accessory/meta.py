"""MetaModel: tokenizer, decoder and loss in one, trained by the engine and asked by the demos."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from accessory.blueprint import DTYPES, Blueprint, make_blueprint, tokenizer_place
from accessory.checkpoint.exchange import hand_on
from accessory.checkpoint.load import fill, resolve
from accessory.checkpoint.run_record import beside, trained_prompt_layouts, trained_system, with_base
from accessory.checkpoint.source import Source
from accessory.data.batch import PackedBatch
from accessory.data.templates import CHAT, DIALOG_END, DialogPrompt, question_prompt
from accessory.errors import ConfigError, ParallelError, explain_validation, nearest
from accessory.foreign_names import unknown
from accessory.generate import KeptCache, generate_tokens, next_token_logits
from accessory.memory.base_cache import BaseCache
from accessory.model.choice import Choice
from accessory.model.decoder import Decoder
from accessory.model.loss import cross_entropy_sum
from accessory.model.scores import TokenScores, token_scores
from accessory.model.sequences import Sequences as DocumentSequences
from accessory.parallel import groups
from accessory.parallel.agree import together
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.tokenizer import Chat, Tokenizer, open_tokenizer, same_tokenizer
from accessory.uses.examples import Examples
from accessory.uses.own_loop import OwnLoop

Prompt = str | Sequence[Mapping[str, str]] | DialogPrompt
"""A text, messages with `role` and `content` for the checkpoint's chat template, or what `MetaModel.question` gives."""
Paths = str | Path | Sequence[str | Path]
Settings = Paths | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]]
"""Of `llama_config`: files, settings themselves, or both, of which the last one that states a key counts."""
_UPSTREAMS = {
    "mp_group": ": layout=groups.start(model_parallel_size=N), of accessory.parallel, cuts the model over ranks.",
    "with_visual": ": there is no vision part yet; leave it out.",
}
"""What LLaMA2-Accessory's `from_pretrained` takes beside ours, and what to write instead."""
_UPSTREAM_SAMPLING = {
    "images": ": there is no vision part yet; leave it out.",
    "image": ": there is no vision part yet; leave it out.",
    "return_logits": ": compute_logits(prompt)[-1] gives them.",
}
"""What LLaMA2-Accessory's `generate` and `stream_generate` take beside ours, and what to write instead."""
_HALF = "\N{REPLACEMENT CHARACTER}"  # what half a character is decoded to


class _Loading(BaseModel):
    """Arguments of `MetaModel.from_pretrained` that are checked here."""

    llama_type: str | None
    tokenizer_path: Path | None
    max_seq_len: int = Field(ge=2)
    quant_type: str | None


def _several(value: Any) -> Any:
    """One text where several may stand."""
    return (value,) if isinstance(value, str) else value


class Sampling(BaseModel):
    """How an answer is chosen: the keyword arguments of `MetaModel.generate` and `Conversation.ask`.

    max_gen_len: most tokens of it. temperature, top_k, top_p, min_p, repetition_penalty: as in `Choice`. stop: texts
    that end it, and are no part of it. seed: of the draws.
    """

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid", frozen=True)

    max_gen_len: int = Field(default=512, ge=0)
    temperature: float = Field(default=0.0, ge=0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_several)] = ()
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)

    @staticmethod
    def of(**values: Any) -> Sampling:
        """Those values; upstream's further arguments may be given unset. Raises `ConfigError` naming the ones that are
        unknown, of a wrong type or out of range.
        """
        known = Sampling.model_fields
        values = {key: value for key, value in values.items() if value or key not in _UPSTREAM_SAMPLING}
        strange = [key for key in values if key not in known]
        hints = {key: _UPSTREAM_SAMPLING.get(key) or _keyword_hint(key, known) for key in strange}
        if faults := [f"MetaModel: unknown key {key!r}{hint}" for key, hint in hints.items()]:
            raise ConfigError("\n".join(faults))
        return _checked(Sampling, **values)


_Arguments = TypeVar("_Arguments", _Loading, Sampling)


class Loaded(NamedTuple):
    """How a model was loaded: base and trained parts, what was built of them, and arguments of `from_pretrained`.

    how: those of `make_blueprint` that another part does not change. quant_stated: whether the caller chose a storage.
    trained: names of the decoder's parameters that training trains.
    """

    sources: list[Source]
    blueprint: Blueprint
    layout: Layout
    max_seq_len: int
    how: dict[str, Any]
    quant_stated: bool
    trained: frozenset[str]


class Score(NamedTuple):
    """Of document `id`: the sum of log p of its supervised tokens, their number, and whether all were the likeliest."""

    id: int
    log_probability: float
    tokens: int
    greedy: bool


class MetaModel(OwnLoop, Examples, nn.Module):
    """`llma` is the decoder, as upstream calls it; calling the model gives the summed loss of a packed batch.

    prompt_layouts: those that training data was in, the one with most documents first; empty where unknown. system: the
    system's words that stood before most conversations; None: the layout's own. encoder: a module that makes the
    embeddings [rows, embedding_dim] of an inset of its name; None where nobody put one there.
    base_cache: what training takes the base's states from, if anything; only for documents of the corpus it is of.
    """

    def __init__(
        self,
        llma: Decoder,
        tokenizer: Tokenizer,
        max_seq_len: int,
        prompt_layouts: tuple[str, ...] = (),
        system: str | None = None,
    ) -> None:
        super().__init__()
        self.encoder: nn.Module | None = None
        self.base_cache: BaseCache | None = None
        self._loaded: Loaded | None = None
        self._hold(llma, tokenizer, max_seq_len, prompt_layouts, system)

    def _hold(
        self,
        llma: Decoder,
        tokenizer: Tokenizer,
        max_seq_len: int,
        prompt_layouts: tuple[str, ...],
        system: str | None,
    ) -> None:
        self.llma, self.tokenizer, self.prompt_layouts, self.system = llma, tokenizer, prompt_layouts, system
        self.max_seq_len = min(max_seq_len, llma.args.longest_document or max_seq_len)
        self.__dict__.pop("chat", None)  # that of another tokenizer

    def forward(self, batch: PackedBatch, hits: Tensor | None = None) -> Tensor:
        """Sum over the batch's supervised tokens of -log p(label), fp32 scalar; estimated where a method draws some.

        hits: as in `cross_entropy_sum`.
        """
        labels, weights = self.llma.learned(batch.labels, batch.weights)
        batch = replace(batch, labels=labels, weights=weights)
        if self.base_cache:
            hidden = self.base_cache.hidden(self.llma, batch, self._sequences(batch))
        else:
            hidden = self.hidden(batch)
        head, vocabulary = self.llma.head_weight, self.llma.args.vocab_size
        return cross_entropy_sum(hidden, head, labels, vocabulary, weights, hits)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """The decoder's output for each packed token [T, embedding_dim], which the head multiplies."""
        inputs = self._with_insets(batch) if batch.insets else batch.tokens
        return self.llma(inputs, self._sequences(batch))

    def _sequences(self, batch: PackedBatch) -> DocumentSequences:
        return self.llma.sequences(batch.lengths, shared=batch.shared).with_labels(batch.labels)

    def _with_insets(self, batch: PackedBatch) -> Tensor:
        """Embeddings [T, embedding_dim] of the batch's tokens, its insets in place of their placeholders."""
        embedded, parts, end = self.llma.tok_embeddings(batch.tokens), [], 0
        for inset in batch.insets:
            rows = inset.content if isinstance(inset.content, Tensor) else self.encoder(inset.content)
            parts += [embedded[end : inset.start], rows.to(embedded.dtype)]
            end = inset.start + inset.rows
        return torch.cat([*parts, embedded[end:]])

    def token_scores(self, batch: PackedBatch) -> TokenScores:
        """log p of each supervised token, and whether it was the likeliest, in packed order; no gradient.

        The batch lies on the model's device.
        """
        with torch.no_grad():
            hidden = self.hidden(batch)
        return token_scores(hidden, self.llma.head_weight, batch.labels, self.llma.args.vocab_size)

    @torch.no_grad()
    def score(self, batch: PackedBatch) -> list[Score]:
        """How likely each document's supervised tokens are, in the batch's order; packing may have sorted them.

        Documents that share a context are computed with one copy of it.
        """
        batch = batch.to(self.llma.frequencies.device)
        own = torch.tensor([length - known for length, known in zip(batch.lengths, batch.shared, strict=True)])
        owner = torch.arange(len(own)).repeat_interleave(own)[(batch.labels >= 0).cpu()]
        log_p, likeliest = self.token_scores(batch)
        each = torch.stack([log_p.double(), ~likeliest, torch.ones_like(log_p)]).double().cpu()
        sums = torch.zeros(3, len(own), dtype=torch.float64).index_add_(1, owner, each)
        return [
            Score(number, value, int(tokens), not misses)
            for number, (value, misses, tokens) in zip(batch.sample_ids, sums.t().tolist(), strict=False)
        ]

    @torch.no_grad()
    def logits(self, tokens: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Packed token ids [T] of documents of `lengths` -> logits [T, V] fp32, on the device that `tokens` are on.

        It holds all of them at once: for comparing models, not for training.
        """
        hidden = self.llma(tokens.to(self.llma.frequencies.device), self.llma.sequences(lengths))
        return next_token_logits(self.llma, hidden).to(tokens.device)

    @property
    def prompt_layout(self) -> str:
        """The default layout of a question: that of most training documents; of a base its chat template, or alpaca."""
        own = "alpaca" if self.tokenizer.chat_template is None else CHAT
        return self.prompt_layouts[0] if self.prompt_layouts else own

    @cached_property
    def chat(self) -> Chat:
        """The chat template at work. Raises `TokenizerError` where the checkpoint has none, or one that is no Jinja."""
        return Chat(self.tokenizer)

    def question(
        self, question: str, context: str = "", prompt_layout: str | None = None, system: str | None = None
    ) -> Prompt:
        """The prompt of a question, and perhaps an input that belongs to it, as training lays it out; for `generate`.

        prompt_layout: one of `accessory.data.templates.PROMPT_LAYOUTS`; absent: `self.prompt_layout`. system: the words
        of the system, for the layouts chat and dialog; absent: `self.system`. Raises `ConfigError` for another layout,
        and for what is no text.
        """
        for name, value in (("question", question), ("context", context)):
            if not isinstance(value, str):
                raise ConfigError(f"{name} is {value!r}; expected a text.")
        layout = prompt_layout or self.prompt_layout
        return question_prompt(question, context, layout, self.system if system is None else system)

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt as in training. If it is too long, its end is kept, with a warning.

        A text follows the tokenizer's start ids; messages are laid out by the checkpoint's chat template.
        """
        start = list(self.tokenizer.start_ids) if isinstance(prompt, str | DialogPrompt) else []
        tokens = self.whole_prompt_tokens(prompt)[len(start) :]
        room = max(self.max_seq_len - 1 - len(start), 1)
        if lost := len(tokens[:-room]):
            warnings.warn(
                f"The first {lost} tokens of a prompt are left out: max_seq_len is {self.max_seq_len}.", stacklevel=2
            )
        return start + tokens[-room:]

    def whole_prompt_tokens(self, prompt: Prompt) -> list[int]:
        """The same, however long the prompt is."""
        if not isinstance(prompt, str | DialogPrompt):
            return self.chat.ids(prompt)
        first, *later = (prompt,) if isinstance(prompt, str) else prompt.pieces
        pieces = [self.tokenizer.encode(first), *self.tokenizer.encode_batch(later, continuation=True)]
        return [*self.tokenizer.start_ids, *(token for piece in pieces for token in piece)]

    def generate(self, prompts: Prompt | Sequence[Prompt], **sampling: Any) -> str | list[str]:
        """The answer to a prompt, or the answers to a list of them.

        sampling: how they are chosen, as `Sampling` says: `max_gen_len`, `temperature`, `top_p`, `stop`, ... Raises
        `ConfigError` for what is no prompt, and for values of `sampling` that cannot be.
        """
        if _is_prompt(prompts):
            return self.generate([prompts], **sampling)[0]
        _check_prompts(prompts)
        how = Sampling.of(**sampling)
        return self._whole_answers(prompts, how, [how.seed])

    def answers(self, prompt: Prompt, count: int, **sampling: Any) -> list[str]:
        """`count` answers to a prompt, which is computed once; `generate` would draw them by `seed`, `seed` + 1, ..."""
        _check_prompts([prompt])
        how = Sampling.of(**sampling)
        if not isinstance(count, int) or count < 1:
            raise ConfigError(f"count is {count!r}; expected a number of answers, 1 or more.")
        return self._whole_answers([prompt] * count, how, [how.seed + number for number in range(count)])

    def _whole_answers(self, prompts: Sequence[Prompt], how: Sampling, seeds: Sequence[int]) -> list[str]:
        ids = [self.prompt_tokens(prompt) for prompt in prompts]
        dialog = [isinstance(prompt, DialogPrompt) for prompt in prompts]
        return self.whole_answers(ids, self.stop_ids(prompts), how, dialog, seeds)

    def whole_answers(
        self,
        ids: list[list[int]],
        stop_ids: frozenset[int],
        how: Sampling,
        dialog: Sequence[bool],
        seeds: Sequence[int] = (),
    ) -> list[str]:
        """The answers to prompts of `ids`, as `generate` gives them. dialog: which are in the layout of that name.

        seeds: as in `steps`.
        """
        answers: list[list[int]] = [[] for _ in ids]
        over: set[int] = set()
        for tokens in self.steps(ids, stop_ids, how, seeds, stopped=lambda: over):
            for number, token in enumerate(tokens):
                if token is not None:
                    answers[number].append(token)
                    if _marks(dialog[number], how.stop) and self._text(dialog[number], answers[number], how.stop)[1]:
                        over.add(number)
            if len(over) == len(ids):
                break
        return [self._text(*pair, how.stop)[0] for pair in zip(dialog, answers, strict=True)]

    def stream_generate(self, prompt: Prompt, **sampling: Any) -> Generator[str, None, None]:
        """The answer so far, each time it grows by a token; held back is what may yet change: half a character, or what
        the end of the turn or a text of `stop` begins with.

        sampling: as in `generate`. The last answer is the same as `generate`'s, even if that ends in half a character.
        """
        _check_prompts([prompt])
        how = Sampling.of(**sampling)
        steps = self.steps([self.prompt_tokens(prompt)], self.stop_ids([prompt]), how)
        yield from self.texts(prompt, steps, how.stop)

    def texts(self, prompt: Prompt, steps: Iterator[list[int]], stop: tuple[str, ...] = ()) -> Iterator[str]:
        """The texts that `stream_generate` gives, of an answer to `prompt` whose tokens come in `steps`."""
        dialog = isinstance(prompt, DialogPrompt)
        marks = _marks(dialog, stop)
        unfinished = (_HALF, *{mark[:length] for mark in marks for length in range(1, len(mark))})
        answer: list[int] = []
        shown = text = ""
        for (token,) in steps:
            answer.append(token)
            text, ended = self._text(dialog, answer, stop)
            if ended:
                break
            if not text.endswith(unfinished):
                shown = text
                yield text
        if text != shown:
            yield text

    def answer_text(self, answer: list[int], dialog: bool) -> str:
        """The words of an answer's tokens, without what ends it. dialog: whether it is in the layout of that name."""
        return self._text(dialog, answer, ())[0]

    def _text(self, dialog: bool, answer: list[int], stop: tuple[str, ...]) -> tuple[str, bool]:
        """(text of an answer so far, whether one of the marks that end it has come)."""
        text = self.tokenizer.decode(answer)
        ends = [end for mark in _marks(dialog, stop) if (end := text.find(mark)) >= 0]
        words = text[: min(ends, default=None)]
        return words.removeprefix(" ") if dialog else words, bool(ends)

    def stop_ids(self, prompts: Sequence[Prompt]) -> frozenset[int]:
        """The ids that end an answer to any of `prompts`: the tokenizer's, and for messages the chat template's."""
        chats = not all(isinstance(prompt, str | DialogPrompt) for prompt in prompts)
        return self.chat.stop_ids if chats else self.tokenizer.stop_ids

    def steps(
        self,
        ids: list[list[int]],
        stop_ids: frozenset[int],
        how: Sampling,
        seeds: Sequence[int] = (),
        kept: KeptCache | None = None,
        stopped: Callable[[], Collection[int]] | None = None,
    ) -> Iterator[list[int | None]]:
        """The answers to prompts of `ids`, a token of each at a time, as `generate_tokens` gives them.

        seeds: one for the batch, or one for each prompt; absent: that of `how`.
        """
        stated, device = self.llma.args.stated_length, self.llma.frequencies.device
        if stated and min(max(map(len, ids), default=0) + how.max_gen_len, self.max_seq_len) > stated:
            warnings.warn(f"An answer may go beyond the {stated} tokens that the model was made for.", stacklevel=2)
        steps = generate_tokens(
            self.llma,
            ids,
            max_gen_len=how.max_gen_len,
            max_seq_len=self.max_seq_len,
            stop_ids=stop_ids,
            choice=Choice(*(getattr(how, name) for name in Choice._fields)),
            generators=[torch.Generator(device).manual_seed(seed) for seed in seeds or [how.seed]],
            kept=kept,
            stopped=stopped,
        )
        return self._without_dropout(steps) if self.training else steps

    def _without_dropout(self, steps: Iterator[list[int | None]]) -> Iterator[list[int | None]]:
        """`steps` of a model that is being trained, which goes on afterwards."""
        self.eval()
        try:
            yield from steps
        finally:
            self.train()

    @staticmethod
    def from_pretrained(
        pretrained_path: Paths,
        *,
        llama_type: str | None = None,
        llama_config: Settings = (),
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 4096,
        dtype: str | torch.dtype = "bf16",
        quant: bool | None = None,
        quant_type: str | None = None,
        device: str | torch.device = "auto",
        layout: Layout | None = None,
        train: bool = False,
        seed: int = 0,
        **others: Any,
    ) -> MetaModel:
        """Load a model for asking. What no argument states is taken from the checkpoints and their run.json.

        pretrained_path: base, then trained parts, or a trained part alone. dtype: bf16, fp16, fp32, or torch's name of
        one. llama_config: files, or settings such as {"lora_rank": 16}. quant: None follows the training run. device:
        auto (CUDA where there is any), cpu, cuda or cuda:N. layout: from `groups.start`, with its device; absent, one
        process is assumed. train: load it for training instead, for a loop of one's own; what llama_type trains and no
        checkpoint holds, such as LoRA, starts as `seed` says. others: with_visual and mp_group of upstream, unset.
        Raises `AccessoryError`s.
        """
        _refuse(others)
        paths, precision = _paths(pretrained_path), _precision(dtype)
        if not paths:
            raise ConfigError(f"pretrained_path is {pretrained_path!r}; expected a checkpoint, or a list of some.")
        given = _checked(
            _Loading,
            llama_type=llama_type,
            tokenizer_path=tokenizer_path or None,
            max_seq_len=max_seq_len,
            quant_type=quant_type,
        )
        if not isinstance(quant, bool | None):
            raise ConfigError(f"quant is {quant!r}; expected True, False or None: the format is named by quant_type.")
        layout = layout or groups.start(str(device))
        if train and layout.mp_size > 1:
            raise ParallelError("train=True takes a model whole on its rank; finetune() trains one that is cut.")
        sources = together(with_base, paths)
        recorded = next((s.run["quantization"] for s in reversed(sources) if s.run), None)
        packed = bool(recorded or quant_type) if quant is None else quant
        how = {"tokenizer_path": given.tokenizer_path, "quant": packed, "precision": precision, "train": train}
        wanted = (quant_type or recorded) if packed else None
        named = {"llama_type": llama_type, "llama_config": _settings(llama_config)}
        blueprint = together(make_blueprint, sources, quant_type=wanted, **named, **how)
        decoder, trained = _filled(blueprint, sources, layout, seed=seed if train else None)
        how_asked = trained_prompt_layouts(sources), trained_system(sources)
        model = MetaModel(decoder, blueprint.tokenizer, given.max_seq_len, *how_asked).train(train)
        stated = quant is not None or quant_type is not None
        model._loaded = Loaded(sources, blueprint, layout, given.max_seq_len, how, stated, trained)
        return model

    def use(self, part: Paths | None, *, llama_type: str | None = None, llama_config: Settings = ()) -> None:
        """Exchange the trained part for another one beside the same base, which stays in memory and is not read again.

        part: a trained part, or several; None: the base alone. llama_type, llama_config: as in `from_pretrained`. All
        model-parallel ranks must call it. Raises `AccessoryError`s for what does not belong to the base that is loaded;
        the model is then what it was.
        """
        if self._loaded is None:
            raise ConfigError("use() exchanges the trained part of a model that MetaModel.from_pretrained has loaded.")
        if self._loaded.blueprint.train:
            raise ConfigError("use() is for a model that is asked; this one was loaded with train=True.")
        loaded, paths = self._loaded, [] if part is None else _paths(part)
        if part is not None and not paths:
            raise ConfigError(f"use() was given {part!r}; expected a trained part, a list of some, or None.")
        sources = base = [source for source in loaded.sources if not (source.is_delta or source.is_difference)]
        if paths:
            sources = together(beside, base, paths)
        together(_check_storage, sources, loaded)
        named = {"llama_type": llama_type, "llama_config": _settings(llama_config)}
        kept = {"quant_type": loaded.blueprint.quant_type, "opener": partial(_reopened, loaded), **loaded.how}
        blueprint = together(make_blueprint, sources, **named, **kept)
        together(_check_targets, blueprint, loaded.blueprint)
        trained = {name for s in (*sources, *loaded.sources) if s.is_delta or s.is_difference for name in s.tensors}
        decoder, names = _filled(blueprint, sources, loaded.layout, lambda new: hand_on(self.llma, new, trained))
        how_asked = trained_prompt_layouts(sources), trained_system(sources)
        self._hold(decoder, blueprint.tokenizer, loaded.max_seq_len, *how_asked)
        self._loaded = loaded._replace(sources=sources, blueprint=blueprint, trained=names)


def load_for_inference(blueprint: Blueprint, sources: list, layout: Layout, max_seq_len: int) -> MetaModel:
    """Build and fill a model without gradients."""
    decoder, _ = _filled(blueprint, sources, layout)
    how_asked = trained_prompt_layouts(sources), trained_system(sources)
    return MetaModel(decoder, blueprint.tokenizer, max_seq_len, *how_asked).eval()


def _filled(
    blueprint: Blueprint,
    sources: list[Source],
    layout: Layout,
    put_in_place: Callable[[Decoder], set[str]] = lambda _: set(),
    seed: int | None = None,
) -> tuple[Decoder, frozenset[str]]:
    """A decoder, and the names of what training trains of it.

    put_in_place: fills some of it beforehand, and returns their names. seed: of what it starts with for training; None:
    it is only asked, and has no gradients.
    """
    decoder, attachment = together(blueprint.build, layout)
    tensors = together(resolve, decoder, sources, attachment, initialize=seed is not None)
    there, alone = put_in_place(decoder), DataParallel(layout, "sdp", base_is_trained=False)
    together(fill, decoder, tensors, attachment, layout, alone, seed or 0, there=there)
    trained = {name for name, _ in decoder.named_parameters()} if blueprint.method.trains_base else attachment.trainable
    if seed is None:
        decoder.requires_grad_(False).eval()
    return decoder, frozenset(trained)


def _reopened(loaded: Loaded, path: Path) -> Tokenizer:
    """The tokenizer at `path`, or the one that is loaded where it is the same."""
    before = loaded.how["tokenizer_path"] or tokenizer_place(loaded.sources)
    return loaded.blueprint.tokenizer if same_tokenizer(before, path) else open_tokenizer(path)


def _check_storage(sources: list[Source], loaded: Loaded) -> None:
    """Raise `ConfigError` for a part that was trained beside another storage than that which is loaded by default."""
    part = next((source for source in reversed(sources) if source.run), None)
    held = loaded.blueprint.quant_type
    if part is None or loaded.quant_stated or part.run["quantization"] == held:
        return
    found, there = (f"a base packed as {name}" if name else "a plain base" for name in (part.run["quantization"], held))
    raise ConfigError(
        f"{part.path}: was trained beside {found}; loaded is {there}. To use it all the same, state quant (and "
        "quant_type) in from_pretrained."
    )


def _check_targets(new: Blueprint, held: Blueprint) -> None:
    """Raise `ConfigError` where other linears of the base would be packed than those that are."""
    aimed = held.quant_targets or new.quant_targets
    if not (held.quant_type and aimed):
        return
    if new.packed_as(held.quant_type) != held.packed_as(held.quant_type):
        raise ConfigError(
            f"It was trained with --quant_targets {' '.join(new.quant_targets) or '(all)'}, loaded is a base with "
            f"{' '.join(held.quant_targets) or '(all)'}: other linears are packed. Load it with from_pretrained."
        )


def _paths(given: Paths) -> list[Path]:
    """One path or several, as `Path`s; an empty text is none. Raises `ConfigError` for what is neither."""
    given = [given] if isinstance(given, str | Path) else given
    if not isinstance(given, Sequence) or not all(isinstance(path, str | Path) for path in given):
        raise ConfigError(f"a path is {given!r}; expected a text or a Path, or a list of some.")
    return [Path(path) for path in given if path != ""]


def _settings(given: Settings) -> list[Path | Mapping[str, Any]]:
    """`given` as a list of paths and settings. Raises `ConfigError` for what is neither."""
    if isinstance(given, Mapping):
        return [given]
    if isinstance(given, str | Path):
        return _paths(given)
    if not isinstance(given, Sequence):
        raise ConfigError(f"llama_config is {given!r}; expected a file, settings, or a list of some.")
    return [part for each in given for part in ([each] if isinstance(each, Mapping) else _paths(each))]


def _refuse(others: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for arguments that `from_pretrained` does not have, naming ours."""
    known = inspect.signature(MetaModel.from_pretrained).parameters
    hints = {name: _UPSTREAMS.get(name) or _keyword_hint(name, known) for name in others}
    if faults := [f"from_pretrained: unknown argument {name!r}{hint}" for name, hint in hints.items()
                  if others[name] or name not in _UPSTREAMS]:  # fmt: skip
        raise ConfigError("\n".join(faults))


def _keyword_hint(name: str, known: Collection[str]) -> str:
    """What `unknown` says of `name`, in which the flags are the keywords `known`, as Python writes them."""
    return re.sub(rf"--({'|'.join(known)})\b", r"\1", unknown(name, known, [f"--{each}" for each in known]))


def _checked(kind: type[_Arguments], **values: Any) -> _Arguments:
    """The arguments of a call. Raises `ConfigError` naming those of a wrong type or range."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise ConfigError(explain_validation(error, "MetaModel", kind.model_fields)) from error


def _precision(dtype: str | torch.dtype) -> str:
    """The name in `DTYPES` of a dtype, given as such a name or as torch's. Raises `ConfigError`."""
    spelled = str(dtype).removeprefix("torch.")
    name = next((name for name, kind in DTYPES.items() if spelled in (name, str(kind).removeprefix("torch."))), None)
    if name is None:
        raise ConfigError(f"dtype {dtype!r} is unknown.{nearest(spelled, DTYPES)} Known: {', '.join(DTYPES)}.")
    return name


def _marks(dialog: bool, stop: tuple[str, ...]) -> tuple[str, ...]:
    """The texts that end an answer: those of `stop`, and in the dialog layout the end of a turn."""
    return (*stop, DIALOG_END) if dialog else stop


def _is_prompt(given: object) -> bool:
    """Whether it is one prompt, rather than a list of them."""
    if isinstance(given, str | DialogPrompt):
        return True
    return isinstance(given, list | tuple) and len(given) > 0 and all(isinstance(part, Mapping) for part in given)


def _check_prompts(prompts: object) -> None:
    """Raise `ConfigError` for what is no list of prompts."""
    if not isinstance(prompts, list | tuple):
        raise ConfigError(f"generate() was given {prompts!r}; expected a prompt, or a list of them.")
    for place, prompt in enumerate(prompts):
        if not _is_prompt(prompt):
            raise ConfigError(
                f"prompt {place} is {prompt!r}; expected a text, a list of messages with role and content, or what "
                "question() gives."
            )
