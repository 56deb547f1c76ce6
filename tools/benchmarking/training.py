"""An engine as `accessory.finetuning` makes one, of fewer settings: nothing is shuffled, saved or shown."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import torch

from accessory.blueprint import DTYPES, Blueprint, make_blueprint
from accessory.checkpoint.load import fill, resolve, targets
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import Source
from accessory.data.corpus import Corpus, build_corpus
from accessory.data.order import GlobalOrder
from accessory.engine import Engine, StepSettings
from accessory.errors import ConfigError
from accessory.memory.base_cache import BaseCache, states_of
from accessory.memory.recompute import choose_layers, recompute_layers
from accessory.memory.row_file import RowFile
from accessory.meta import MetaModel
from accessory.method import Attachment, Method, presets
from accessory.model.decoder import Decoder
from accessory.model.families import architecture_of
from accessory.optim import build_optimizer
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.parallel.parameters import NamedParameters
from accessory.run.integer_moves import IntegerMoves
from accessory.run.report import Reporter
from accessory.run.schedule import Schedule
from accessory.run.signals import StopSignals
from tools.benchmarking.random_parts import random_corpus, random_source
from tools.model_sizes import is_shape

METHODS = presets()
WITH_LORA = tuple(name for name, method in METHODS.items() if getattr(method.settings, "lora_rank", 0) > 0)


@dataclass(frozen=True)
class Training:
    """What is trained, and on what.

    model: a checkpoint, or a shape that gets random weights. data None: random documents, whose tokens are those of
    `seq` in turn.
    quant_type None: plain weights. rank None: the method's, or the adapter's.
    """

    model: str
    data: str | None
    steps: int
    batch_size: int
    seq: tuple[int, ...]
    supervised: float
    max_words: int
    method: str
    rank: int | None
    adapter: str | None
    quant_type: str | None
    precision: str
    lr: float
    optim: str
    checkpointing: int | str
    share_prefixes: bool
    cache_base: str | None = None
    cache_base_rows: str = "exact"

    def engine(self, layout: Layout) -> Engine:
        """Ready for its first step. Raises `AccessoryError`s."""
        blueprint, sources = self._blueprint(layout)
        decoder, attachment = blueprint.build(layout)
        layers, _ = choose_layers(self.checkpointing, sum(1 for _ in decoder.blocks()), lambda _: None, layout, "")
        data_parallel = DataParallel(layout, "sdp", blueprint.method.trains_base)
        self._fill(decoder, attachment, sources, layout, data_parallel)
        recompute_layers(decoder, layers, offload=False, device=layout.device)
        slicings = {target.name: target.slicing for target in targets(decoder)}
        model = MetaModel(decoder, blueprint.tokenizer, self.max_words)
        data_parallel.shard_root(model)
        everything = NamedParameters(dict(decoder.named_parameters()), slicings | attachment.working)
        parameters, rule = everything.only(attachment.trainable), blueprint.method.integer_rule
        order = GlobalOrder(
            self._corpus(blueprint, layout), batch_size=self.batch_size, accum_iter=1, dp_rank=layout.dp_rank,
            dp_size=layout.dp_size, shuffle=False,
            share_prefixes=self.share_prefixes and not blueprint.method.drops_out,
        )  # fmt: skip
        model.base_cache = self._base_cache(decoder, order, layout)
        torch.manual_seed(0)  # a method that draws which labels to learn from draws the same in each call
        return Engine(
            model=model,
            parameters=parameters,
            optimizer=build_optimizer(self.optim, parameters, self.lr, weight_decay=0.0),
            order=order,
            schedule=Schedule(1, order.steps_per_epoch, 0.0, self.lr, self.lr, 2.0, 1, 1),
            settings=StepSettings(scales_loss=self.precision == "fp16"),
            reporter=Reporter(None, 0, 0, enabled=False),
            saver=None,
            signals=StopSignals(),
            base_cache=model.base_cache,
            moves=IntegerMoves(decoder, rule, layout) if rule else None,
        )

    def _fill(
        self,
        decoder: Decoder,
        attachment: Attachment,
        sources: list[Source],
        layout: Layout,
        data_parallel: DataParallel,
    ) -> None:
        """Read every parameter into place."""
        tensors = resolve(decoder, sources, attachment, initialize=True)
        fill(decoder, tensors, attachment, layout, data_parallel)

    def _base_cache(self, decoder: Decoder, order: GlobalOrder, layout: Layout) -> BaseCache | None:
        """An empty one."""
        if self.cache_base is None:
            return None
        states = states_of(decoder, self.cache_base_rows)
        file = RowFile(Path(self.cache_base), order.corpus.offsets, states, {"format": "of a benchmark"})
        file.open()
        return BaseCache(file, layout, "sdp")

    def _blueprint(self, layout: Layout) -> tuple[Blueprint, list[Source]]:
        if is_shape(self.model):
            args, base = random_source(self.model, layout.device)
            sources = self._with_adapter(base)
            made = Blueprint(
                self._llama_type(base), args, None, self.quant_type, DTYPES[self.precision], None, train=True
            )
        else:
            sources = self._with_adapter(open_source(self.model))
            made = make_blueprint(
                sources, llama_type=self._llama_type(sources[0]), 
                quant_type=self.quant_type, precision=self.precision, train=True,
            )  # fmt: skip
        return replace(made, method=self._method(sources[1:])), sources

    def _llama_type(self, base: Source) -> str:
        name = (base.settings or {}).get("architecture", "llama")
        return architecture_of(name, str(base.path)).family + METHODS[self.method].suffix

    def _with_adapter(self, base: Source) -> list[Source]:
        return [base] if self.adapter is None else [base, open_source(self.adapter, base)]

    def _method(self, adapters: list[Source]) -> Method:
        """The settings with the rank, scale and targets of an adapter, which the user cannot choose."""
        method = METHODS[self.method]
        if self.method not in WITH_LORA:
            return method
        settings = method.settings.model_dump() | ({} if self.rank is None else {"lora_rank": self.rank})
        for adapter in adapters:
            stated = {key: value for key, value in (adapter.settings or {}).items() if key.startswith("lora_")}
            if stated.get("lora_rank", -1) < 1:
                raise ConfigError(f"--adapter {adapter.path}: has no LoRA; expected factors to start from.")
            if self.rank not in (None, stated["lora_rank"]):
                raise ConfigError(f"--rank {self.rank}: {adapter.path} has rank {stated['lora_rank']}; leave it out.")
            settings |= stated
        return type(method)(method.Settings(**settings))

    def _corpus(self, blueprint: Blueprint, layout: Layout) -> Corpus:
        if self.data is not None:
            if blueprint.tokenizer is None:
                raise ConfigError(f"--data {self.data}: --model {self.model} has no tokenizer; give a checkpoint.")
            corpus = build_corpus(Path(self.data), blueprint.tokenizer, max_words=self.max_words)
            corpus.check_lengths(blueprint.args.longest_document, None)
            return corpus
        documents = self.steps * self.batch_size * layout.dp_size
        lengths = list(islice(cycle(self.seq), documents))
        return random_corpus(lengths, self.supervised, blueprint.args.vocab_size)
