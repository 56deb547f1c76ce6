"""Decoding: greedy or nucleus sampling (Holtzman et al. 2020) over a key/value cache, a batch of prompts at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.errors import ConfigError
from accessory.model.decoder import Decoder
from accessory.parallel.groups import model_parallel_group
from accessory.parallel.tensor import gather_from_model_parallel_region


@torch.inference_mode()
def generate_tokens(
    decoder: Decoder,
    prompts: list[list[int]],
    *,
    max_gen_len: int,
    max_seq_len: int,
    stop_ids: set[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[list[int | None]]:
    """Yield, a step at a time, the next token id of each prompt; None once a prompt has ended.

    A prompt ends after one of `stop_ids` (which is not yielded), `max_gen_len` new tokens, or `max_seq_len` in all (or
    as many as the model has positions for).
    Temperature 0 is greedy. All model-parallel ranks must call with the same arguments; they get the same tokens.
    Raises `ConfigError` for a prompt that is empty or leaves no room.
    """
    max_seq_len = min(max_seq_len, decoder.args.longest_document or max_seq_len)
    for prompt in prompts:
        if not 0 < len(prompt) < max_seq_len:
            raise ConfigError(f"A prompt has {len(prompt)} tokens; expected 1 to {max_seq_len - 1} (--max_seq_len).")
    device = decoder.frequencies.device
    rooms = [min(max_gen_len, max_seq_len - len(prompt)) for prompt in prompts]
    cache = decoder.new_cache(len(prompts), max(len(p) + room for p, room in zip(prompts, rooms, strict=True)))
    lengths, starts = tuple(len(prompt) for prompt in prompts), (0,) * len(prompts)
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    alive = [room > 0 for room in rooms]
    decoder.prepare_decoding()
    produced = 0
    while any(alive):
        hidden = decoder(tokens, decoder.sequences(lengths, starts), cache)
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        tokens = sample(next_token_logits(decoder, hidden[ends]), temperature, top_p, generator)
        produced += 1
        starts = tuple(start + length for start, length in zip(starts, lengths, strict=True))
        lengths = (1,) * len(prompts)
        chosen = tokens.tolist()
        alive = [ok and token not in stop_ids for ok, token in zip(alive, chosen, strict=True)]
        if not any(alive):
            return
        yield [token if ok else None for ok, token in zip(alive, chosen, strict=True)]
        alive = [ok and produced < room for ok, room in zip(alive, rooms, strict=True)]
        # A document that ended keeps its place in the batch, without running past the end of its cache.
        starts = tuple(min(start, cache[0].keys.shape[1] - 1) for start in starts)


def next_token_logits(decoder: Decoder, hidden: Tensor) -> Tensor:
    """hidden [B, embedding_dim] -> logits of the whole vocabulary [B, V], fp32, equal on all model-parallel ranks."""
    logits = hidden @ decoder.head_weight.to(hidden.dtype).t()
    return gather_from_model_parallel_region(logits)[:, : decoder.args.vocab_size].float()


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """logits [B, V] -> token ids [B]. The first rank of the group chooses, the others follow."""
    if temperature < 1e-3:  # below it softmax overflows, and the likeliest token is all there is
        tokens = logits.argmax(-1)
    else:
        probabilities, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
        # The token that crosses top_p stays: the nucleus is the smallest set that reaches it.
        beyond = probabilities.cumsum(-1) - probabilities >= top_p
        beyond[:, 0] = False  # even a top_p of 0 leaves the likeliest token
        probabilities[beyond] = 0
        picked = torch.multinomial(probabilities, 1, generator=generator)
        tokens = order.gather(-1, picked)[:, 0]
    group = model_parallel_group()
    if dist.get_world_size(group) > 1:
        dist.broadcast(tokens, dist.get_global_rank(group, 0), group=group)
    return tokens
