"""Decoding over a key/value cache, a batch of prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.errors import ConfigError
from accessory.kernels.avx512.packed_gemv import MOST_ROWS
from accessory.model.cache import LayerCache
from accessory.model.choice import Choice, Seen, choose
from accessory.model.decoder import Decoder
from accessory.model.decoding import decoding
from accessory.parallel.groups import model_parallel_group
from accessory.parallel.tensor import gather_from_model_parallel_region

_GROWTH = 256  # tokens by which a kept cache grows, at least
_STOPPED = -1  # what the first rank sends in place of a token, to end an answer on all ranks
_GREEDY = Choice()


class KeptCache:
    """The keys and values of one document, kept from one answer to the next; `tokens` are those that they belong to."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.layers: list[LayerCache] = []
        self._decoder: Decoder | None = None

    def begin(self, decoder: Decoder, ids: list[int], longest: int) -> int:
        """Keep what `ids` begin with, and make room for `longest` tokens; returns how many of `ids` need no computing.

        The last one always does, since its output is wanted. Of another decoder than before nothing is kept.
        """
        if decoder is not self._decoder:
            self.tokens, self.layers, self._decoder = [], [], decoder
        known = 0
        while known < min(len(self.tokens), len(ids) - 1) and self.tokens[known] == ids[known]:
            known += 1
        del self.tokens[known:]
        if not self.layers:
            self.layers = decoder.new_cache(1, longest)
        elif (room := self.layers[0].keys.shape[1]) < longest:
            for layer in self.layers:
                layer.grow(max(longest, room + _GROWTH), known)
        return known


@torch.inference_mode()
def generate_tokens(
    decoder: Decoder,
    prompts: list[list[int]],
    *,
    max_gen_len: int,
    max_seq_len: int,
    stop_ids: Set[int],
    choice: Choice = _GREEDY,
    generators: Sequence[torch.Generator | None] = (None,),
    kept: KeptCache | None = None,
    stopped: Callable[[], Collection[int]] | None = None,
) -> Iterator[list[int | None]]:
    """Yield, a step at a time, the next token id of each prompt; None once a prompt has ended.

    A prompt ends after one of `stop_ids` (which is not yielded), `max_gen_len` new tokens, or `max_seq_len` in all (or
    as many as the model has positions for).
    All model-parallel ranks must call with the same arguments; they get the same tokens.
    generators: one to draw the whole batch by, or one for each prompt, so that its answer does not depend on others.
    kept: of a single prompt, what was computed for the ones before it. stopped: asked before each token which prompts
    end without it; what it says on the first rank counts on all.
    Raises `ConfigError` for a prompt that is empty or leaves no room.
    """
    max_seq_len = min(max_seq_len, decoder.args.longest_document or max_seq_len)
    for prompt in prompts:
        if not 0 < len(prompt) < max_seq_len:
            raise ConfigError(f"A prompt has {len(prompt)} tokens; expected 1 to {max_seq_len - 1} (--max_seq_len).")
    rooms = [min(max_gen_len, max_seq_len - len(prompt)) for prompt in prompts]
    alive = [i for i, room in enumerate(rooms) if room > 0]
    if not alive:
        return
    decoder.prepare_decoding()
    longest = max(len(prompts[i]) + rooms[i] for i in alive)
    if kept is None:
        known, cache = 0, decoder.new_cache(len(alive), longest)
    else:
        (prompt,) = prompts
        known = kept.begin(decoder, prompt, longest)
        cache = kept.layers
    hidden = read_prompts(decoder, [prompts[i] for i in alive], cache, known)
    if kept is not None:
        kept.tokens += prompt[known:]
    if len(generators) > 1:
        generators = [generators[i] for i in alive]
    repeats = choice.repetition_penalty != 1
    device = decoder.frequencies.device
    seen = Seen([prompts[i] for i in alive], decoder.args.vocab_size, device) if repeats else None
    ends, produced = {*stop_ids, _STOPPED}, 0
    while True:
        tokens = choose(next_token_logits(decoder, hidden), choice, generators, seen)
        over = () if stopped is None else stopped()
        tokens = agreed(tokens, [row for row, i in enumerate(alive) if i in over])
        produced += 1
        chosen = {i: token for i, token in zip(alive, tokens.tolist(), strict=True) if token not in ends}
        if not chosen:
            return
        yield [chosen.get(i) for i in range(len(prompts))]
        rows = [row for row, i in enumerate(alive) if i in chosen and produced < rooms[i]]
        if not rows:
            return
        if len(rows) < len(alive):  # prompts that have ended are dropped from the batch
            for layer in cache:
                layer.keep(rows, max(len(prompts[i]) for i in alive) + produced)
            alive, tokens = [alive[row] for row in rows], tokens[rows]
            generators = [generators[row] for row in rows] if len(generators) > 1 else generators
            if seen is not None:
                seen.keep(rows)
        if seen is not None:
            seen.add(tokens)
        starts = tuple(len(prompts[i]) + produced - 1 for i in alive)
        with decoding():
            hidden = decoder(tokens, decoder.sequences((1,) * len(alive), starts), cache)
        if kept is not None:
            kept.tokens += chosen.values()


def read_prompts(decoder: Decoder, prompts: list[list[int]], cache: list[LayerCache], known: int = 0) -> Tensor:
    """Fill a `cache` that holds the first `known` tokens of the prompt, or prompts; returns the decoder's output for
    each prompt's last token [B, embedding_dim].

    On a CPU, prompts are read in groups that the kernel for few rows can take: kernels round differently, and an answer
    should not depend on the other prompts of the batch. A prompt that is asked several times is read once.
    """
    if len(prompts) > 1 and all(prompt == prompts[0] for prompt in prompts):
        last = read_prompts(decoder, prompts[:1], [layer.documents(0, 1) for layer in cache], known)
        for layer in cache:
            layer.copy_first(len(prompts[0]))
        return last.expand(len(prompts), -1)
    device = decoder.frequencies.device
    most = MOST_ROWS if device.type == "cpu" else sum(map(len, prompts))
    prompts, lasts, begin = [prompt[known:] for prompt in prompts], [], 0
    while begin < len(prompts):
        end = begin + 1
        while end < len(prompts) and sum(map(len, prompts[begin : end + 1])) <= most:
            end += 1
        lengths = tuple(len(prompt) for prompt in prompts[begin:end])
        tokens = torch.tensor([token for prompt in prompts[begin:end] for token in prompt], device=device)
        part = [layer.documents(begin, end) for layer in cache]
        with decoding():
            hidden = decoder(tokens, decoder.sequences(lengths, (known,) * len(lengths)), part)
        lasts.append(hidden[torch.tensor(lengths, device=device).cumsum(0) - 1])
        begin = end
    return torch.cat(lasts)


def next_token_logits(decoder: Decoder, hidden: Tensor) -> Tensor:
    """hidden [B, embedding_dim] -> logits of the whole vocabulary [B, V], fp32, equal on all model-parallel ranks."""
    with _plain_products() if len(hidden) == 1 and hidden.is_cpu else nullcontext():
        logits = hidden @ decoder.head_weight.to(hidden.dtype).t()
    return gather_from_model_parallel_region(logits)[:, : decoder.args.vocab_size].float()


@contextmanager
def _plain_products() -> Iterator[None]:
    """PyTorch's own product of a single row, which reads a bf16 head at about twice the pace of oneDNN's."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def agreed(tokens: Tensor, over: list[int]) -> Tensor:
    """Token ids [B] that a rank chose -> what the first rank of the group chose, and rows `over` that it ends."""
    if over:
        tokens = tokens.index_fill(0, torch.tensor(over, device=tokens.device), _STOPPED)
    group = model_parallel_group()
    if dist.get_world_size(group) > 1:
        dist.broadcast(tokens, dist.get_global_rank(group, 0), group=group)
    return tokens
