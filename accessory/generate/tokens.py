"""The loop over tokens: choose one, yield it, and go on from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence, Set

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.errors import ConfigError, NotFiniteError
from accessory.generate.kept import KeptCache
from accessory.generate.logits import next_token_logits
from accessory.generate.prompts import Embed, read_prompts
from accessory.generate.static_memory import StaticMemory, is_static
from accessory.generate.steps import GrowingSteps, StaticSteps
from accessory.model.choice import NOTHING, Choice, Seen, choose
from accessory.model.decoder import Decoder
from accessory.parallel.groups import model_parallel_group

_STOPPED = -1  # what the first rank sends in place of a token, to end an answer on all ranks
_GREEDY = Choice()


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
    embed: Embed | None = None,
    pictures: Sequence[int | None] = (),
) -> Iterator[list[int | None]]:
    """Yield, a step at a time, the next token id of each prompt; None once a prompt has ended.

    A prompt ends after one of `stop_ids` (which is not yielded), `max_gen_len` new tokens, or `max_seq_len` in all (or
    as many as the model has positions for).
    All model-parallel ranks must call with the same arguments; they get the same tokens.
    generators: one to draw the whole batch by, or one for each prompt, so that its answer does not depend on others.
    kept: for a single prompt, the cache of the prompts before it. stopped: called before each token, says which prompts
    end without it; the first rank's answer counts on all. embed, pictures: for prompts with insets, as in
    `read_prompts`.
    Raises `ConfigError` for a prompt that is empty or leaves no room, and `NotFiniteError` where nothing can be drawn.
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
    waiting, longest = [prompts[i] for i in alive], max(len(prompts[i]) + rooms[i] for i in alive)
    beside, memory, known = [pictures[i] for i in alive] if pictures else [], None, 0
    if kept is not None:
        (prompt,) = prompts
        known = kept.begin(decoder, prompt, longest, *beside)
        whole, memory = kept.layers, kept.static() if is_static(decoder) else None
    elif is_static(decoder):
        memory = StaticMemory.of(decoder, len(alive), longest)
        whole = memory.layers
    else:
        whole = decoder.new_cache(len(alive), longest)
    if any(key is not None for key in beside):
        decoder.make_room_for_pictures(whole)
    cache = whole if kept is not None else [layer.documents(0, len(alive)) for layer in whole]
    hidden = read_prompts(decoder, waiting, cache, known, embed, beside)
    if kept is not None:
        kept.tokens += prompt[known:]
    lengths = list(map(len, waiting))
    steps = GrowingSteps(decoder, cache, lengths) if memory is None else StaticSteps(memory, lengths)
    if len(generators) > 1:
        generators = [generators[i] for i in alive]
    repeats = choice.repetition_penalty != 1
    device = decoder.frequencies.device
    seen = Seen(waiting, decoder.args.vocab_size, device) if repeats else None
    ends, produced, logits = {*stop_ids, _STOPPED}, 0, next_token_logits(decoder, hidden)
    while True:
        tokens = choose(logits, choice, generators, seen)
        over = () if stopped is None else stopped()
        tokens = agreed(tokens, [row for row, i in enumerate(alive) if i in over])
        produced += 1
        ids = steps.ids(tokens, any(produced < rooms[i] for i in alive))
        if NOTHING in ids:
            raise NotFiniteError(
                "The model's probabilities of the next token are no finite numbers. Compute in bf16 or fp32 (--dtype), "
                "or look whether its weights are whole."
            )
        chosen = {i: token for i, token in zip(alive, ids, strict=True) if token not in ends}
        if not chosen:
            return
        yield [chosen.get(i) for i in range(len(prompts))]
        rows = [row for row, i in enumerate(alive) if i in chosen and produced < rooms[i]]
        if not rows:
            return
        if len(rows) < len(alive):  # prompts that have ended are dropped from the batch
            steps.keep(rows)
            alive, tokens = [alive[row] for row in rows], tokens[rows]
            generators = [generators[row] for row in rows] if len(generators) > 1 else generators
            if seen is not None:
                seen.keep(rows)
        if seen is not None:
            seen.add(tokens)
        logits = steps.logits(tokens)
        if kept is not None:
            kept.tokens += chosen.values()


def agreed(tokens: Tensor, over: list[int]) -> Tensor:
    """Token ids [B] that a rank chose -> what the first rank of the group chose, and rows `over` that it ends."""
    if over:
        tokens = tokens.index_fill(0, torch.tensor(over, device=tokens.device), _STOPPED)
    group = model_parallel_group()
    if dist.get_world_size(group) > 1:
        dist.broadcast(tokens, dist.get_global_rank(group, 0), group=group)
    return tokens
