"""MetaModel: tokenizer, decoder and loss in one, trained by the engine and asked by the demos."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from accessory.blueprint import Blueprint, make_blueprint
from accessory.checkpoint.run_record import with_base
from accessory.checkpoint.source import Source
from accessory.data.batch import PackedBatch
from accessory.errors import ConfigError, ParallelError
from accessory.generate import next_token_logits
from accessory.memory.base_cache import BaseCache
from accessory.meta.answers import Answers
from accessory.meta.arguments import Loading, Paths, Settings, as_paths, as_settings, checked, precision_of, refuse
from accessory.meta.examples import Examples
from accessory.meta.loading import Loaded, exchanged, filled, trained_prompts
from accessory.meta.own_loop import OwnLoop
from accessory.model.decoder import Decoder
from accessory.model.linear import lora_additions
from accessory.model.lora_factors import constant_factors
from accessory.model.loss import cross_entropy_sum
from accessory.model.scores import TokenScores, token_scores
from accessory.model.sequences import Sequences
from accessory.model.teacher import Teacher
from accessory.parallel import groups
from accessory.parallel.agree import together
from accessory.parallel.groups import Layout
from accessory.tokenizer import Tokenizer
from accessory.vision import Vision
from accessory.vision.encoder import PictureEncoder


class Score(NamedTuple):
    """Of document `id`: the sum of log p of its supervised tokens, their number, and whether all were the likeliest."""

    id: int
    log_probability: float
    tokens: int
    greedy: bool


class MetaModel(Answers, Examples, OwnLoop, nn.Module):
    """`llma` is the decoder, as upstream calls it; calling the model gives the summed loss of a packed batch.

    prompt_layouts: those that training data was in, the one with most documents first; empty where unknown. system: the
    system's words that stood before most conversations; None: the layout's own. encoder: makes the embeddings
    [rows, embedding_dim] of each of several contents of insets; None where nobody put one there. vision: the part that
    sees pictures, if the model has one (`see`).
    base_cache: what training takes the base's states from, if anything; only for documents of the corpus it is of.
    teacher: from whom it learns beside the labels, if from anyone.
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
        self.encoder: Callable[[list[Any]], list[Tensor]] | None = None
        self.vision: Vision | None = None
        self.base_cache: BaseCache | None = None
        self.teacher: Teacher | None = None
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

    def see(self, vision: Vision | None, **how: Any) -> None:
        """Have batches' pictures turned into rows by `vision`, which is on the decoder, in place; None: by nobody.

        how: as for `PictureEncoder`.
        """
        self.vision = vision
        self.encoder = PictureEncoder(vision, self.llma, **how) if vision else None
        if vision:
            vision.place_buffers(self.llma, self.llma.frequencies.device)

    def forward(self, batch: PackedBatch, hits: Tensor | None = None, entropy: Tensor | None = None) -> Tensor:
        """Sum over the batch's supervised tokens of -log p(label), fp32 scalar; estimated where a method draws some.

        With a teacher, of what `Teaching` makes of it. hits: fp64 [], to which the number of answers' tokens is added
        that no other token is likelier than. entropy: fp64 [], to which -log p(label) is added where there is a
        teacher.
        """
        # It goes first: nothing of the student's is alive yet.
        teaching = self.teacher.teach(batch, entropy) if self.teacher else None
        labels, weights, rows = self.llma.learned(batch.labels, batch.weights, batch.labelled)
        # Where some labels are drawn, those of answers count for as many more as their losses do.
        counted = None if batch.answers is None else batch.answers * (weights / batch.weights)
        batch = replace(batch, labels=labels, weights=weights, rows=rows)
        if self.base_cache:
            hidden = self.base_cache.hidden(self.llma, batch, self._sequences(batch))
        else:
            hidden = self.hidden(batch)
        head, vocabulary = self.llma.head_weight, self.llma.args.vocab_size
        return cross_entropy_sum(hidden, head, labels, vocabulary, weights, hits, counted, teaching, rows)

    def constant(self) -> AbstractContextManager[None]:
        """A context in which no parameter changes, so that what products derive from them is computed once."""
        groups = (linears for _, block in self.llma.blocks() for linears in block.linears_by_input())
        return constant_factors(map(lora_additions, groups), self.llma.dtype)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """The decoder's output for each packed token [T, embedding_dim], which the head multiplies."""
        inputs = self._with_insets(batch) if batch.insets or self.vision else batch.tokens
        return self.llma(inputs, self._sequences(batch))

    def _sequences(self, batch: PackedBatch) -> Sequences:
        made = self.llma.sequences(batch.lengths, shared=batch.shared).with_labelled(batch.labelled)
        return replace(made, pictures=self._pictures_beside(batch)) if batch.insets else made

    def _pictures_beside(self, batch: PackedBatch) -> tuple[tuple[int, Tensor | None], ...]:
        """`Sequences.pictures` of a batch: its insets of 0 rows. Those of neighbours without one are put together."""
        insets = {inset.start: inset.content for inset in batch.insets if not inset.rows}
        if not insets:
            return ()
        made = dict(zip(insets, self.encoder(list(insets.values())), strict=True))
        runs: list[tuple[int, Tensor | None]] = []
        begin = 0
        for length, known in zip(batch.lengths, batch.shared, strict=True):
            tokens, picture = length - known, made.get(begin)
            begin += tokens
            if runs and picture is None and runs[-1][1] is None:
                tokens += runs.pop()[0]
            runs.append((tokens, picture))
        return tuple(runs)

    def _with_insets(self, batch: PackedBatch) -> Tensor:
        """Embeddings [T, embedding_dim] of the batch's tokens, its insets in place of their placeholders."""
        embedded, parts, end = self.llma.tok_embeddings(batch.tokens), [], 0
        insets = [inset for inset in batch.insets if inset.rows]  # others enter elsewhere
        named = [inset.content for inset in insets if not isinstance(inset.content, Tensor)]
        encoded = iter(self.encoder(named) if named else ())
        for inset in insets:
            rows = inset.content if isinstance(inset.content, Tensor) else next(encoded)
            parts += [embedded[end : inset.start], rows.to(embedded.dtype)]
            end = inset.start + inset.rows
        # Where no document has a picture, what is trained behind the encoder takes part all the same.
        absent = self.encoder.no_rows() if self.vision and not named else []
        return torch.cat([*parts, embedded[end:], *absent])

    def token_scores(self, batch: PackedBatch, taught: bool = False) -> TokenScores:
        """log p of each supervised token, and whether it was the likeliest, in packed order; no gradient.

        The batch lies on the model's device. taught: with the divergence from the teacher, if there is one.
        """
        teaching = self.teacher.teach(batch) if taught and self.teacher else None
        with torch.no_grad():
            hidden = self.hidden(batch)
        return token_scores(hidden, self.llma.head_weight, batch.labels, self.llma.args.vocab_size, teaching)

    @torch.no_grad()
    def score(self, batch: PackedBatch) -> list[Score]:
        """How likely each document's supervised tokens are, in the batch's order; packing may have sorted them.

        Documents that share a context are computed with one copy of it.
        """
        batch = batch.to(self.llma.frequencies.device)
        own = torch.tensor([length - known for length, known in zip(batch.lengths, batch.shared, strict=True)])
        owner = torch.arange(len(own)).repeat_interleave(own)[(batch.labels >= 0).cpu()]
        log_p, likeliest, _ = self.token_scores(batch)
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

    @staticmethod
    def from_pretrained(
        pretrained_path: Paths,
        *,
        llama_type: str | None = None,
        llama_config: Settings = (),
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 4096,
        dtype: str | torch.dtype = "bf16",
        vision_path: str | Path | None = None,
        with_visual: bool | None = None,
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
        checkpoint holds, such as LoRA, starts as `seed` says. vision_path: a directory of the image encoder, where the
        checkpoints do not hold it or say where it is; with_visual: False leaves it out. others: mp_group of upstream.
        Raises `AccessoryError`s.
        """
        refuse(others, inspect.signature(MetaModel.from_pretrained).parameters)
        paths, precision = as_paths(pretrained_path), precision_of(dtype)
        if not paths:
            raise ConfigError(f"pretrained_path is {pretrained_path!r}; expected a checkpoint, or a list of some.")
        given = checked(
            Loading,
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
        sources = together(with_base, paths, vision_path, with_visual is False)
        recorded = next((s.run["quantization"] for s in reversed(sources) if s.run), None)
        packed = bool(recorded or quant_type) if quant is None else quant
        how = {"tokenizer_path": given.tokenizer_path, "quant": packed, "precision": precision, "train": train}
        how |= {"no_visual": with_visual is False}
        wanted = (quant_type or recorded) if packed else None
        named = {"llama_type": llama_type, "llama_config": as_settings(llama_config)}
        blueprint = together(make_blueprint, sources, quant_type=wanted, **named, **how)
        if train and blueprint.method.integer_rule:
            raise ConfigError(
                "train=True cannot move integers, which happens between the steps of finetune(). Use that, or give "
                'llama_config={"tune": "statistics"}.'
            )
        decoder, trained = filled(blueprint, sources, layout, seed=seed if train else None)
        model = MetaModel(decoder, blueprint.tokenizer, given.max_seq_len, *trained_prompts(sources)).train(train)
        model.see(blueprint.vision, divides=layout.mp_size > 1)
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
        loaded, paths = self._loaded, [] if part is None else as_paths(part)
        if part is not None and not paths:
            raise ConfigError(f"use() was given {part!r}; expected a trained part, a list of some, or None.")
        decoder, self._loaded = exchanged(loaded, self.llma, paths, llama_type, as_settings(llama_config))
        sources, blueprint = self._loaded.sources, self._loaded.blueprint
        self._hold(decoder, blueprint.tokenizer, loaded.max_seq_len, *trained_prompts(sources))
        self.see(blueprint.vision, divides=loaded.layout.mp_size > 1)


def load_for_inference(blueprint: Blueprint, sources: list[Source], layout: Layout, max_seq_len: int) -> MetaModel:
    """Build and fill a model without gradients."""
    decoder, _ = filled(blueprint, sources, layout)
    model = MetaModel(decoder, blueprint.tokenizer, max_seq_len, *trained_prompts(sources)).eval()
    model.see(blueprint.vision, divides=layout.mp_size > 1)
    return model
