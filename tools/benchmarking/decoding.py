"""Greedy decoding of the same prompts by us, or by transformers and bitsandbytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from accessory.blueprint import Blueprint
from accessory.data.corpus import build_corpus
from accessory.errors import ConfigError
from accessory.generate import generate_tokens
from accessory.meta import MetaModel, load_for_asking
from accessory.method.peft import Peft
from accessory.parallel.groups import Layout
from accessory.tokenizer import open_tokenizer
from tools.benchmarking.loading import load_peer
from tools.benchmarking.random_parts import SIZES, random_corpus, random_source

Answers = list[list[int]]
_WARM_UP = 2  # tokens


@dataclass(frozen=True)
class Decoding:
    """`batch_size` prompts of `prompt_tokens` tokens, of `data` or random, and `new_tokens` behind each."""

    model: str
    data: str | None
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    quant_type: str | None

    def by_us(self, layout: Layout) -> tuple[float, Answers]:
        """(seconds, new tokens of each prompt)."""
        model = self._ours(layout)
        prompts = self._prompts(model.llma.args.vocab_size, model.tokenizer)

        def decode(count: int) -> Answers:
            longest = self.prompt_tokens + count
            steps = generate_tokens(model.llma, prompts, max_gen_len=count, max_seq_len=longest, stop_ids=set())
            return [list(answer) for answer in zip(*steps, strict=True)]

        return self._timed(decode)

    def by_peer(self, layout: Layout) -> tuple[float, Answers]:
        """The same by transformers, told not to stop either."""
        if self.model in SIZES:
            raise ConfigError(f"--peer: --model {self.model} is in no file; give a Hugging Face directory.")
        quant_type = self.quant_type
        model = load_peer(self.model, quant_type is not None, quant_type or "nf4", str(layout.device)).eval()
        model.generation_config.eos_token_id = None
        prompts = torch.tensor(
            self._prompts(model.config.vocab_size, open_tokenizer(Path(self.model))), device=layout.device
        )

        def decode(count: int) -> Answers:
            found = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, do_sample=False, pad_token_id=0
            )
            return found[:, prompts.shape[1] :].tolist()

        return self._timed(decode)

    def _ours(self, layout: Layout) -> MetaModel:
        longest = self.prompt_tokens + self.new_tokens
        if self.model not in SIZES:
            quant = self.quant_type is not None
            return MetaModel.from_pretrained(
                self.model, quant=quant, quant_type=self.quant_type, layout=layout, max_seq_len=longest
            )
        args, source = random_source(self.model, layout.device)
        nothing = Peft(Peft.Settings(norm_tuning=True, bias_tuning=False))
        blueprint = Blueprint("llama_peft", args, nothing, self.quant_type, torch.bfloat16, None, train=False)
        return load_for_asking(blueprint, [source], layout, longest)

    def _prompts(self, vocab_size: int, tokenizer) -> Answers:
        if self.data is None:
            corpus = random_corpus(self.batch_size, self.prompt_tokens, 1.0, vocab_size)
        elif tokenizer is None:
            raise ConfigError(f"--data {self.data}: --model {self.model} has no tokenizer; give a checkpoint.")
        else:
            corpus = build_corpus(Path(self.data), tokenizer, max_words=1 << 20)
        long = [i for i, length in enumerate(corpus.lengths) if length >= self.prompt_tokens][: self.batch_size]
        if len(long) < self.batch_size:
            raise ConfigError(
                f"--batch_size {self.batch_size}: {self.data} has {len(long)} documents of --prompt_tokens "
                f"{self.prompt_tokens} or more."
            )
        return [corpus.document(i)[0][: self.prompt_tokens].tolist() for i in long]

    def _timed(self, decode: Callable[[int], Answers]) -> tuple[float, Answers]:
        decode(min(_WARM_UP, self.new_tokens))
        began = time.perf_counter()
        answers = decode(self.new_tokens)  # as lists of numbers: a GPU is through with them
        return time.perf_counter() - began, answers
