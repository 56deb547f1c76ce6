"""MetaModel: tokenizer, decoder and loss in one, trained by the engine and asked by the demos."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from accessory.blueprint import Blueprint, draw_blueprint
from accessory.checkpoint.load import fill, resolve
from accessory.checkpoint.run_record import with_base
from accessory.data.batch import PackedBatch
from accessory.generate import generate_tokens, next_token_logits
from accessory.model.decoder import Decoder
from accessory.model.loss import cross_entropy_sum
from accessory.parallel import groups
from accessory.parallel.agree import together
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, str]]
"""A text, or messages of `role` and `content` for the checkpoint's chat template."""


class MetaModel(nn.Module):
    """`llma` is the decoder, as upstream calls it; calling the model gives the summed loss of a packed batch."""

    def __init__(self, llma: Decoder, tokenizer: Tokenizer, max_seq_len: int) -> None:
        super().__init__()
        self.llma, self.tokenizer = llma, tokenizer
        self.max_seq_len = min(max_seq_len, llma.args.longest_document or max_seq_len)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Sum over the batch's supervised tokens of -log p(label), fp32 scalar."""
        hidden = self.llma(batch.tokens, self.llma.sequences(batch.lengths, shared=batch.shared))
        return cross_entropy_sum(hidden, self.llma.head_weight, batch.labels, self.llma.args.vocab_size)

    @torch.no_grad()
    def logits(self, tokens: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Packed token ids [T] of documents of `lengths` -> logits [T, V] fp32. For measuring: it holds them all."""
        hidden = self.llma(tokens, self.llma.sequences(lengths))
        return next_token_logits(self.llma, hidden)

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """A prompt as training laid it out; its end is kept where it is too long.

        A text stands behind what opens the tokenizer's documents; messages are laid out by the checkpoint's template.
        """
        if not isinstance(prompt, str):
            return self.tokenizer.chat_ids(prompt)[-max(self.max_seq_len - 1, 1) :]
        start = list(self.tokenizer.opening)
        room = max(self.max_seq_len - 1 - len(start), 1)
        return start + self.tokenizer.encode(prompt)[-room:]

    def generate(
        self,
        prompts: list[Prompt],
        *,
        max_gen_len: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        seed: int = 0,
    ) -> list[str]:
        """Answers to a batch of prompts."""
        answers: list[list[int]] = [[] for _ in prompts]
        for tokens in self._steps(prompts, max_gen_len, temperature, top_p, seed):
            for answer, token in zip(answers, tokens, strict=True):
                if token is not None:
                    answer.append(token)
        return [self.tokenizer.decode(answer) for answer in answers]

    def stream_generate(
        self, prompt: Prompt, *, max_gen_len: int = 512, temperature: float = 0.0, top_p: float = 0.95, seed: int = 0
    ) -> Iterator[str]:
        """The answer so far, each time it grows by a token; half a character is held back until it is whole.

        The last answer is `generate`'s, even where that ends in half a character.
        """
        answer: list[int] = []
        shown = text = ""
        for (token,) in self._steps([prompt], max_gen_len, temperature, top_p, seed):
            answer.append(token)
            text = self.tokenizer.decode(answer)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                shown = text
                yield text
        if text != shown:
            yield text

    def _steps(
        self, prompts: list[Prompt], max_gen_len: int, temperature: float, top_p: float, seed: int
    ) -> Iterator[list[int | None]]:
        chats = not all(isinstance(prompt, str) for prompt in prompts)
        return generate_tokens(
            self.llma,
            [self.prompt_tokens(prompt) for prompt in prompts],
            max_gen_len=max_gen_len,
            max_seq_len=self.max_seq_len,
            stop_ids=self.tokenizer.chat.stop_ids if chats else self.tokenizer.stop_ids,
            temperature=temperature,
            top_p=top_p,
            generator=torch.Generator(self.llma.frequencies.device).manual_seed(seed),
        )

    @staticmethod
    def from_pretrained(
        pretrained_path: str | Path | list[str | Path],
        *,
        llama_type: str | None = None,
        llama_config: list[Path] | None = None,
        tokenizer_path: Path | None = None,
        max_seq_len: int = 4096,
        dtype: str = "bf16",
        quant: bool | None = None,
        quant_type: str | None = None,
        layout: Layout | None = None,
    ) -> MetaModel:
        """Load a model for asking. What is not said is taken from the checkpoints and their run.json.

        pretrained_path: base, then trained parts, or a trained part alone. quant: None follows the training run.
        layout: from `groups.start`; absent, one process is assumed. Raises `AccessoryError`s.
        """
        paths = pretrained_path if isinstance(pretrained_path, list) else [pretrained_path]
        layout = layout or groups.start("cpu")
        sources = together(lambda: with_base(paths))
        recorded = next((s.run["quantization"] for s in reversed(sources) if s.run), None)
        wanted = (quant_type or recorded) if (quant or (quant is None and recorded)) else None
        blueprint = together(
            lambda: draw_blueprint(
                sources,
                llama_type=llama_type,
                llama_config=llama_config or [],
                tokenizer_path=tokenizer_path,
                quant=bool(quant),
                quant_type=wanted,
                precision=dtype,
                train=False,
            )
        )
        return load_for_asking(blueprint, sources, layout, max_seq_len)


def load_for_asking(blueprint: Blueprint, sources: list, layout: Layout, max_seq_len: int) -> MetaModel:
    """Build and fill a model without gradients."""
    decoder, attachment = together(lambda: blueprint.build(layout))
    tensors = together(lambda: resolve(decoder, sources, attachment, initialize=False))
    together(lambda: fill(decoder, tensors, attachment, layout, DataParallel(layout, "sdp", base_is_trained=False)))
    model = MetaModel(decoder, blueprint.tokenizer, max_seq_len)
    return model.requires_grad_(False).eval()
