"""Greedy decoding of the same prompts by us, and by transformers and bitsandbytes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import torch

from accessory.blueprint import DTYPES, Blueprint
from accessory.data.corpus import build_corpus
from accessory.errors import ConfigError
from accessory.generate import generate_tokens
from accessory.meta import MetaModel, load_for_inference
from accessory.method.full import Full
from accessory.model.decoder import Decoder
from accessory.parallel.groups import Layout
from tools.benchmarking.ideal import decoding_bytes
from tools.benchmarking.loading import load_peer
from tools.benchmarking.random_parts import random_corpus, random_source
from tools.model_sizes import is_shape

Tokens = list[list[int]]
_WARM_UP = 2  # new tokens


@dataclass
class Run:
    """One system's decoding. stamps: seconds from the start to each new token (of all prompts); answers: new tokens.

    read_bytes: what a step must read at least; 0 where it was not counted.
    """

    prompts: Tokens
    stamps: list[float] = field(default_factory=list)
    answers: Tokens = field(default_factory=list)
    read_bytes: int = 0

    @property
    def ms_per_token(self) -> float:
        """Milliseconds per token, without the first, whose time is that of reading the prompts."""
        return 1000 * (self.stamps[-1] - self.stamps[0]) / (len(self.stamps) - 1)

    def figures(self) -> dict[str, float]:
        """The figures to print; `tokens_per_s` includes the time of the prompts."""
        tokens = sum(map(len, self.answers))
        return {
            "seconds": round(self.stamps[-1], 3),
            "tokens_per_s": round(tokens / self.stamps[-1], 1),
            "prompt_seconds": round(self.stamps[0], 3),
            "ms_per_token": round(self.ms_per_token, 3),
        }

    def equal_tokens(self, other: Run) -> int:
        """How many tokens both gave before they first differed, over all prompts."""
        pairs = zip(self.answers, other.answers, strict=True)
        return sum(len(list(takewhile(lambda both: both[0] == both[1], zip(a, b, strict=True)))) for a, b in pairs)


@dataclass(frozen=True)
class Decoding:
    """`batch_size` prompts of `prompt_tokens` tokens, of `data` or random, and `new_tokens` behind each."""

    model: str
    data: str | None
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    quant_type: str | None
    precision: str

    def by_us(self, layout: Layout) -> Run:
        """Nothing ends an answer early."""
        model = self._ours(layout)
        self._check_room(model.llma)
        prompts = self._prompts(model)
        longest = self.prompt_tokens + self.new_tokens

        def decode(count: int, new_step: Callable[[], None]) -> Tokens:
            """`count` tokens for each prompt; `new_step` is called after each token."""
            steps = []
            for tokens in generate_tokens(model.llma, prompts, max_gen_len=count, max_seq_len=longest, stop_ids=set()):
                steps.append(tokens)
                new_step()
            return [list(answer) for answer in zip(*steps, strict=True)]

        run = self._timed(prompts, decode)
        run.read_bytes = decoding_bytes(model.llma, self.batch_size, self.prompt_tokens + self.new_tokens // 2)
        return run

    def by_peer(self, prompts: Tokens, layout: Layout) -> Run:
        """The same by transformers, without an end-of-text token either."""
        gc.collect()  # our model, if it is still there
        model = load_peer(
            self.model, self.quant_type is not None, self.quant_type or "nf4", DTYPES[self.precision], layout.device
        ).eval()
        model.generation_config.eos_token_id = None
        tokens = torch.tensor(prompts, device=layout.device)

        def decode(count: int, new_step: Callable[[], None]) -> Tokens:
            """`count` tokens for each prompt; `new_step` is called after each token."""
            found = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=[_Stamping(new_step)],
            )
            return found[:, tokens.shape[1] :].tolist()

        return self._timed(prompts, decode)

    def _ours(self, layout: Layout) -> MetaModel:
        longest = self.prompt_tokens + self.new_tokens
        if not is_shape(self.model):
            quant = self.quant_type is not None
            return MetaModel.from_pretrained(
                self.model, quant=quant, quant_type=self.quant_type, dtype=self.precision, layout=layout,
                max_seq_len=longest,
            )  # fmt: skip
        args, source = random_source(self.model, layout.device)
        method, dtype = Full(Full.Settings()), DTYPES[self.precision]
        blueprint = Blueprint("llama", args, method, self.quant_type, dtype, None, train=False)
        return load_for_inference(blueprint, [source], layout, longest)

    def _check_room(self, decoder: Decoder) -> None:
        room, longest = decoder.args.longest_document, self.prompt_tokens + self.new_tokens
        if room is not None and longest > room:
            raise ConfigError(
                f"--prompt_tokens {self.prompt_tokens} and --new_tokens {self.new_tokens}: the model has positions for "
                f"{room} tokens."
            )

    def _prompts(self, model: MetaModel) -> Tokens:
        if self.data is None:
            corpus = random_corpus([self.prompt_tokens] * self.batch_size, 1.0, model.llma.args.vocab_size)
        elif model.tokenizer is None:
            raise ConfigError(f"--data {self.data}: --model {self.model} has no tokenizer; give a checkpoint.")
        else:
            corpus = build_corpus(Path(self.data), model.tokenizer, max_words=1 << 20)
        long = [i for i, length in enumerate(corpus.lengths) if length >= self.prompt_tokens][: self.batch_size]
        if len(long) < self.batch_size:
            raise ConfigError(
                f"--batch_size {self.batch_size}: {self.data} has {len(long)} documents of --prompt_tokens "
                f"{self.prompt_tokens} or more."
            )
        return [corpus.document(i)[0][: self.prompt_tokens].tolist() for i in long]

    def _timed(self, prompts: Tokens, decode: Callable[[int, Callable[[], None]], Tokens]) -> Run:
        decode(min(_WARM_UP, self.new_tokens), lambda: None)
        run = Run(prompts)
        began = time.perf_counter()
        # Ours are numbers on the host by then, and `_Stamping` synchronizes: a GPU has finished the token.
        run.answers = decode(self.new_tokens, lambda: run.stamps.append(time.perf_counter() - began))
        return run


class _Stamping:
    """A stopping criterion, which transformers calls after every token: it notes the time and never stops."""

    def __init__(self, new_step: Callable[[], None]) -> None:
        self.new_step = new_step

    def __call__(self, tokens: torch.Tensor, _scores: object, **_settings) -> torch.Tensor:
        """tokens [B, S] so far -> [B]: none stops."""
        stops = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)
        self.new_step()
        return stops
