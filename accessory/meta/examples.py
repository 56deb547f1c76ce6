"""Logits and likelihoods of examples, called as LLaMA2-Accessory calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accessory.data.batch import IGNORE, Document, Inset, PackedBatch
from accessory.data.pictures import Picture
from accessory.errors import DataError
from accessory.generate import next_token_logits
from accessory.meta.images import TRANSFORM, Image

Example = str | Sequence[int] | Tensor
"""A text, or the ids of its tokens."""


class Examples:
    """Part of `MetaModel`."""

    @torch.no_grad()
    def compute_logits(
        self,
        examples: Example | Sequence[Example],
        images: Image | Sequence[Image | None] | None = None,
        *,
        image_transform: str = TRANSFORM,
        bos: bool = True,
        eos: bool = False,
    ) -> Tensor | list[Tensor]:
        """Logits [S, V] of an example, or those of a list of them, fp32 on the model's device.

        images, image_transform: as in `generate`; S counts tokens only, and each row is what the token behind it is
        predicted from. bos, eos: whether a text gets the tokenizer's start ids and its end; a list of ids is taken as
        it is. Raises `DataError` for an example without tokens, or with ids beyond the vocabulary, and what `picture`
        raises.
        """
        many = examples if _is_list_of_examples(examples) else [examples]
        pictures = self._pictures(images, len(many), image_transform)
        ids = [self._example_ids(example, place, bos, eos) for place, example in enumerate(many)]
        if any(picture is not None for picture in pictures):
            logits = self._logits_with_pictures(ids, pictures)
        else:
            lengths, device = tuple(map(len, ids)), self.llma.frequencies.device
            tokens = torch.tensor([token for part in ids for token in part], device=device)
            logits = list(self.logits(tokens, lengths).split(lengths)) if ids else []
        return logits if many is examples else logits[0]

    def _logits_with_pictures(self, ids: list[list[int]], pictures: list[Picture | None]) -> list[Tensor]:
        place, documents, kept, begin = self.vision.place, [], [], 0
        for number, (tokens, picture) in enumerate(zip(ids, pictures, strict=True)):
            start, rows = (0, 0) if picture is None else (place.start(tokens, self.tokenizer.start_ids), place.rows)
            whole = np.array([*tokens[:start], *[0] * rows, *tokens[start:]], dtype=np.int64)
            insets = () if picture is None else (Inset(start, rows, picture),)
            documents.append(Document(whole, np.full(len(whole), IGNORE), number, insets))
            # The token behind the image is predicted from the image's last row.
            before = [at - 1 + rows * (at >= start) for at in range(1, len(tokens))]
            kept.append(torch.tensor([*before, len(whole) - 1]) + begin)
            begin += len(whole)
        device = self.llma.frequencies.device
        hidden = self.hidden(PackedBatch.pack(documents, share=False).to(device))
        return list(next_token_logits(self.llma, hidden[torch.cat(kept).to(device)]).split(list(map(len, ids))))

    @torch.no_grad()
    def evaluate_examples(
        self,
        examples: Example | Sequence[Example],
        contexts: Example | Sequence[Example] | None = None,
        images: Image | Sequence[Image | None] | None = None,
        *,
        image_transform: str = TRANSFORM,
        bos: bool = True,
        eos: bool = False,
    ) -> dict[str, Any]:
        """How likely examples are, or what follows their contexts in them; a list per key, for a list of examples.

        log_likelihood: sum of log p. ppl: perplexity. max_equal: whether each token was the likeliest. Each counts the
        tokens behind the context, or all but the first. non_context_logits: what these were predicted from [S, V].
        images, image_transform, bos, eos: as in `compute_logits`. Raises `DataError` where an example does not begin
        with the tokens of its context, or nothing follows them.
        """
        how = {"image_transform": image_transform, "bos": bos, "eos": eos}
        if not _is_list_of_examples(examples):
            alone = self.evaluate_examples([examples], contexts if contexts is None else [contexts], images, **how)
            return {name: values[0] for name, values in alone.items()}
        if contexts is not None and (not _is_list_of_examples(contexts) or len(contexts) != len(examples)):
            raise DataError(f"contexts is {contexts!r:.80}; expected one for each of the {len(examples)} examples.")
        found: dict[str, list[Any]] = {"log_likelihood": [], "ppl": [], "max_equal": [], "non_context_logits": []}
        for place, logits in enumerate(self.compute_logits(examples, images, **how)):
            ids = self._example_ids(examples[place], place, bos, eos)
            known = 1
            if contexts is not None:
                context = self._example_ids(contexts[place], place, bos, False)
                known = len(context)
                _check_context(place, context, ids)
            logits, labels = logits[known - 1 : -1], torch.tensor(ids[known:], device=logits.device)
            each = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0].double()
            found["log_likelihood"].append(each.sum().item())
            found["ppl"].append(each.mean().neg().exp().item())
            found["max_equal"].append(bool((logits.argmax(-1) == labels).all()))
            found["non_context_logits"].append(logits)
        return found

    def _example_ids(self, example: Example, place: int, bos: bool, eos: bool) -> list[int]:
        if isinstance(example, str):
            ids = [*self.tokenizer.start_ids] * bos + self.tokenizer.encode(example) + [self.tokenizer.eos_id] * eos
        else:
            ids = [int(token) for token in example]
        most = self.llma.args.vocab_size
        if not ids or not 0 <= min(ids) <= max(ids) < most:
            raise DataError(f"example {place} has the tokens {ids!r:.80}; expected one or more of 0 to {most - 1}.")
        return ids


def _is_list_of_examples(given: object) -> bool:
    """Whether it is a list of examples, rather than one. Raises `DataError` for what is neither."""
    if isinstance(given, str | Tensor):
        return False
    if isinstance(given, Sequence) and all(isinstance(part, int) for part in given) and given:
        return False
    if isinstance(given, Sequence) and all(isinstance(part, str | Sequence | Tensor) for part in given):
        return True
    raise DataError(f"examples are {given!r:.80}; expected a text or ids of tokens, or a list of some.")


def _check_context(place: int, context: list[int], example: list[int]) -> None:
    """Raise `DataError` where what is scored of an example is not what follows its context."""
    if example[: len(context)] == context and len(context) < len(example):
        return
    same = next((at for at, pair in enumerate(zip(context, example)) if len({*pair}) > 1), len(context))  # noqa: B905
    raise DataError(
        f"example {place} has {len(example)} tokens and its context {len(context)}, of which it begins with {same}; "
        "expected all, and more behind them. A text that ends in a space, or inside a word, often has other tokens."
    )
