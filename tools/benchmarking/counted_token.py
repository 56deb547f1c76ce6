"""One token of an answer on a pretended GPU, and what it asks for: from the documents' token ids to their logits."""

from __future__ import annotations

from typing import Any

import torch

from accessory.generate.logits import next_token_logits
from accessory.generate.static_memory import StaticMemory, chain_for
from accessory.model.args import ModelArgs
from accessory.model.choice import Choice, choose
from accessory.model.decoding import decoding
from accessory.parallel.groups import Layout
from tools.benchmarking.counted_steps import GPU, PretendedTraining
from tools.benchmarking.launches import Counts, LaunchCounter
from tools.benchmarking.pretended_gpu import pretended


def token(args: ModelArgs, method: str, quant_type: str | None, **how: Any) -> Counts:
    """What a token of an answer of the whole model asks for: blocks are alike. how: as `counted_token`."""
    one, two = (
        counted_token(args.model_copy(update={"n_layers": depth}), method, quant_type, **how).total()
        for depth in (1, 2)
    )
    return sum([two - one] * (args.n_layers - 1), one)


def counted_token(
    args: ModelArgs,
    method: str,
    quant_type: str | None,
    *,
    triton: bool,
    documents: int = 1,
    context: int = 1024,
    static: bool = True,
) -> LaunchCounter:
    """What the likeliest next token of `documents` documents asks a GPU for, where nothing is recorded.

    context: tokens of the cache that are looked at. static: in fixed places, as a GPU answers; else in the documents'
    own shapes. It needs `groups.start`.
    """
    with pretended(triton), torch.no_grad():
        memory, counter = pretended_answering(args, method, quant_type, documents, context), LaunchCounter()
        for _ in range(2):  # the first run prepares what later ones read
            counter.clear()
            with counter:
                logits = memory.forward(documents, context) if static else _growing(memory, documents, context)
                memory.tokens[:documents].copy_(choose(logits, Choice(), (None,)))
    return counter


def pretended_answering(
    args: ModelArgs, method: str, quant_type: str | None, documents: int, context: int, precision: str = "bf16"
) -> StaticMemory:
    """Of a model that answers on a pretended GPU: a cache of `context` tokens for each of `documents` documents."""
    training = PretendedTraining(
        model="", data=None, steps=2, batch_size=1, seq=(64,), supervised=1.0, max_words=64, method=method, rank=None,
        adapter=None, quant_type=quant_type, precision=precision, lr=1e-4, optim="adamw", checkpointing=0,
        share_prefixes=False, args=args,
    )  # fmt: skip
    decoder = training.engine(Layout(device=GPU)).model.llma.requires_grad_(False).eval()
    decoder.prepare_decoding()
    memory = StaticMemory(decoder, decoder.new_cache(documents, context))
    memory.chain = chain_for(decoder, context)
    return memory


def _growing(memory: StaticMemory, documents: int, context: int) -> torch.Tensor:
    decoder = memory.decoder
    ones, starts = (1,) * documents, (context - 1,) * documents
    with decoding():
        hidden = decoder(memory.tokens, decoder.sequences(ones, starts), memory.layers)
    return next_token_logits(decoder, hidden)
