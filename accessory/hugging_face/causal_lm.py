"""Side-tuned language models as modules of PyTorch: padded batches in, loss and logits out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from accessory.checkpoint.formats.qst_writing import write_qst
from accessory.checkpoint.lazy import HeldTensor
from accessory.errors import ConfigError, DataError
from accessory.generate import generate_tokens
from accessory.hugging_face.adopting import TheirConfig, adopt, open_model
from accessory.hugging_face.config import QSTConfig
from accessory.hugging_face.forward import CausalForward, check_ids, keep_only
from accessory.hugging_face.padding import PaddedRows
from accessory.hugging_face.state import load_state, save_state
from accessory.method.side_network import SideDecoder
from accessory.model.choice import Choice


class QSTForCausalLM(CausalForward, nn.Module):
    """A side network beside a model that transformers loaded, plain or in 4 bits by bitsandbytes.

    The model's weights are used where they lie, and frozen; only the side network's parameters require gradients, and
    only they are in `state_dict`. Forward takes and gives what a causal language model of transformers does, so that
    its Trainer can train it.
    """

    loss_type: ClassVar[str] = "ForCausalLM"
    """Tells Trainer that a row's first label does not count."""
    family: ClassVar[str | None] = None
    """The only family that a subclass takes; None: all."""

    def __init__(
        self,
        model: nn.Module,
        config: TheirConfig,
        qst_config: QSTConfig,
        *,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        """model: from transformers, on one device. config: its settings; qst_config: the side network's.

        dtype: what is computed in; None: `bnb_4bit_compute_dtype`, or the type of a plain model. seed: of the side
        network's start. Raises `CheckpointError` for a model type that is not known, `ConfigError` for another family
        than the class's and for settings that do not fit the model.
        """
        super().__init__()
        source = open_model(model, config)
        if self.family not in (None, source.llama_type):
            raise ConfigError(
                f"{type(self).__name__} takes models of the family {self.family}; {source.path} is of the family "
                f"{source.llama_type} (model_type {source.settings['architecture']!r}): use "
                f"{_class_of(source.llama_type)}."
            )
        self.config = config
        self.decoder, attachment = adopt(model, source, qst_config, dtype, seed)
        self.added, self.trainable = frozenset(attachment.initial), frozenset(attachment.trainable)
        keep_only(self, {f"decoder.{name}" for name in self.trainable})

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.decoder.frequencies.device

    @property
    def _decoder(self) -> SideDecoder:
        return self.decoder

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Prompts [B, S] -> themselves and their answers [B, S + longest answer], int64, as in transformers.

        An answer that ends before `max_new_tokens` is followed by the first of `eos_token_id` and then padded. Both ids
        are by default those of `config`, and padding the end's. Without `do_sample` decoding is greedy.
        Raises `DataError` and `ConfigError` for prompts that cannot be.
        """
        rows = PaddedRows.of(input_ids, attention_mask)
        if len(rows.lengths) < len(input_ids):
            raise DataError(f"{len(input_ids) - len(rows.lengths)} of {len(input_ids)} prompts are all padding.")
        tokens = rows.packed(input_ids)
        check_ids("input_ids", tokens, 0, self.decoder.args.vocab_size)
        eos = getattr(self.config, "eos_token_id", None) if eos_token_id is None else eos_token_id
        ends = [eos] if isinstance(eos, int) else list(eos or ())
        stated = getattr(self.config, "pad_token_id", None) if pad_token_id is None else pad_token_id
        padding = (ends or [0])[0] if stated is None else stated
        prompts = [row.tolist() for row in tokens.split(rows.lengths)]
        with self._asked():
            steps = list(
                generate_tokens(
                    self.decoder,
                    prompts,
                    max_gen_len=max_new_tokens,
                    max_seq_len=max(rows.lengths) + max_new_tokens + 1,
                    stop_ids=set(ends),
                    choice=Choice(temperature if do_sample else 0.0, top_p=top_p),
                    generators=[torch.Generator(self.device).manual_seed(seed)],
                )
            )
        answers = [[step[i] for step in steps if step[i] is not None] for i in range(len(prompts))]
        for prompt, answer in zip(prompts, answers, strict=True):
            room = (self.decoder.args.longest_document or math.inf) - len(prompt)
            answer += ends[: len(answer) < min(max_new_tokens, room)]
        longest = max(map(len, answers))
        new = [answer + [padding] * (longest - len(answer)) for answer in answers]
        return torch.cat([input_ids, torch.tensor(new, dtype=torch.int64, device=input_ids.device)], 1)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """In eval mode; afterwards again in the one before."""
        training = self.training
        self.eval()
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            self.train(training)

    def save_qst_state(self, directory: str | Path, *, released: bool = False) -> None:
        """Write the side network as a trained part, which every command takes behind its base.

        Files of the same names are replaced. released: write the files of the published code instead, into a new
        directory. Raises `CheckpointError` where that is not possible: a disk that is full, a `directory` that holds
        the config.json of a transformers model, settings that the published code does not have.
        """
        if released:
            tensors = {name: HeldTensor(p.detach()) for name, p in self._added()}
            write_qst(tensors, self.decoder.args, self.decoder.settings, Path(directory), Path(type(self).__name__))
        else:
            save_state(self.decoder, self.trainable, Path(directory))

    def load_qst_state(self, directory: str | Path) -> None:
        """Take over a side network of the same form that any run, or the published code, has saved.

        Raises `CheckpointError` for one that does not fit, `ConfigError` for one that computes differently.
        """
        load_state(self.decoder, dict(self._added()), self.trainable, Path(directory))

    def _added(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The side network's parameters, by the decoder's names; the published code leaves some of them as they are."""
        return ((name, p) for name, p in self.decoder.named_parameters() if name in self.added)


class QSTLlamaForCausalLM(QSTForCausalLM):
    """`QSTForCausalLM` for models of the family llama: LLaMA, Mistral, Qwen, Baichuan, InternLM."""

    family = "llama"


class QSTOPTForCausalLM(QSTForCausalLM):
    """`QSTForCausalLM` for OPT."""

    family = "opt"


def _class_of(family: str | None) -> str:
    classes = {kind.family: kind.__name__ for kind in (QSTLlamaForCausalLM, QSTOPTForCausalLM)}
    return classes.get(family, QSTForCausalLM.__name__)
