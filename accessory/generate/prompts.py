"""Reading prompts into the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from accessory.kernels.avx512.packed_gemv import MOST_ROWS
from accessory.model.cache import LayerCache
from accessory.model.decoder import Decoder
from accessory.model.decoding import decoding

Embed = Callable[[list[int]], list[Tensor]]
"""Keys of insets -> their embeddings [rows, embedding_dim] each."""


def read_prompts(
    decoder: Decoder,
    prompts: list[list[int]],
    cache: list[LayerCache],
    known: int = 0,
    embed: Embed | None = None,
    pictures: Sequence[int | None] = (),
) -> Tensor:
    """Fill a `cache` that holds the first `known` tokens of the prompt, or prompts; returns the decoder's output for
    each prompt's last token [B, embedding_dim].

    A negative id is the key of an inset, and stands for each of its rows; `embed` gives those that are not cached yet.
    pictures: the key of each prompt's inset of 0 rows, or None; where a prompt is known in part, its inset is, too.

    On a CPU, prompts are read in groups that the kernel for few rows can take: kernels round differently, and an answer
    should not depend on the other prompts of the batch. A prompt that occurs several times is read once.
    """
    if len(prompts) > 1 and all(prompt == prompts[0] for prompt in prompts) and len(set(pictures)) < 2:
        first = [layer.documents(0, 1) for layer in cache]
        last = read_prompts(decoder, prompts[:1], first, known, embed, pictures[:1])
        for layer in cache:
            layer.copy_first(len(prompts[0]))
        return last.expand(len(prompts), -1)
    device = decoder.frequencies.device
    most = MOST_ROWS if device.type == "cpu" else sum(map(len, prompts))
    insets = [] if embed is None else _inset_rows(prompts, known, embed)
    # Once a cache has room for what pictures add, it holds something for every document.
    beside = _beside(prompts, embed, pictures) if not known and any(layer.beside for layer in cache) else []
    prompts, lasts, begin = [prompt[known:] for prompt in prompts], [], 0
    while begin < len(prompts):
        end = begin + 1
        while end < len(prompts) and sum(map(len, prompts[begin : end + 1])) <= most:
            end += 1
        lengths = tuple(len(prompt) for prompt in prompts[begin:end])
        tokens = torch.tensor([token for prompt in prompts[begin:end] for token in prompt], device=device)
        part = [layer.documents(begin, end) for layer in cache]
        inputs = _with_rows(decoder, tokens, insets[begin:end]) if any(insets[begin:end]) else tokens
        sequences = decoder.sequences(lengths, (known,) * len(lengths))
        if beside:
            sequences = replace(sequences, pictures=tuple(zip(lengths, beside[begin:end], strict=True)))
        with decoding():
            hidden = decoder(inputs, sequences, part)
        lasts.append(hidden[torch.tensor(lengths, device=device).cumsum(0) - 1])
        begin = end
    return torch.cat(lasts)


def _beside(prompts: list[list[int]], embed: Embed | None, pictures: Sequence[int | None]) -> list[Tensor | None]:
    """What each prompt's inset of 0 rows adds beside its tokens, or None."""
    keys = list(dict.fromkeys(key for key in pictures if key is not None))
    made = dict(zip(keys, embed(keys), strict=True)) if keys else {}
    return [None if key is None else made[key] for key in pictures or [None] * len(prompts)]


def _inset_rows(prompts: list[list[int]], known: int, embed: Embed) -> list[list[Tensor]]:
    """Of each prompt, the embeddings that stand behind its first `known` tokens, in order."""
    runs = [[run for run in inset_runs(prompt) if run[1] > known] for prompt in prompts]
    keys = list(dict.fromkeys(key for each in runs for _, _, key in each))
    rows: Mapping[int, Tensor] = dict(zip(keys, embed(keys), strict=True)) if keys else {}
    return [[rows[key].repeat((end - begin) // len(rows[key]), 1)[max(known - begin, 0) :] for begin, end, key in each]
            for each in runs]  # fmt: skip


def inset_runs(ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(begin, end, key) of the places where the same inset stands, once or several times behind one another."""
    end = 0
    for key, run in groupby(ids):
        begin, end = end, end + sum(1 for _ in run)
        if key < 0:
            yield begin, end, key


def _with_rows(decoder: Decoder, tokens: Tensor, insets: list[list[Tensor]]) -> Tensor:
    """Embeddings [T, embedding_dim] of tokens [T], those of `insets` in place of the negative ones."""
    embedded = decoder.tok_embeddings(tokens.clamp(min=0))
    embedded[tokens < 0] = torch.cat([rows for each in insets for rows in each]).to(embedded)
    return embedded
