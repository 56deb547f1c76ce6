"""What is measured of a checkpoint, in a process of its own or one of several: logits, greedy answers, training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.load import fill, resolve, targets
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import model_args_of
from accessory.generate import generate_tokens, next_token_logits
from accessory.method import METHODS, Attachment
from accessory.model.decoder import Decoder
from accessory.model.loss import cross_entropy_sum
from accessory.optim import build_optimizer
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.parallel.parameters import NamedParameters
from accessory.quant import storage

LENGTHS = (19, 1, 12)
IDS = torch.arange(sum(LENGTHS)) * 37 % 97
PROMPTS = ([5, 96, 33, 2, 60, 41, 8, 77, 13], [88, 3, 50])
ANSWER = 12
STEPS, RATE = 6, 5e-3
METHODS_TRAINED = {"peft": {"lora_rank": 4}, "qst": {"r": 2, "side_heads": 2, "gate": "scalar", "label_share": 1}}
"""Method -> settings with which it is trained beside NF4."""


def read_decoder(directory: Path, layout: Layout, method: str | None = None) -> tuple[Decoder, Attachment]:
    """This rank's decoder in fp32, plain, or packed in NF4 and ready to be trained by a method of `METHODS_TRAINED`."""
    source, how = open_source(directory), {"dtype": torch.float32, "rank": layout.mp_rank, "ranks": layout.mp_size}
    args = model_args_of(source)
    if method is None:
        decoder, attachment = Decoder(args, **how), Attachment()
    else:
        trainer = METHODS[method](METHODS[method].Settings(**METHODS_TRAINED[method]))
        decoder = trainer.decoder(args, **how, storage=storage("nf4"))
        attachment = trainer.attach(decoder)
    tensors = resolve(decoder, [source], attachment, initialize=True)
    fill(decoder, tensors, attachment, layout, DataParallel(layout, "sdp", base_is_trained=False))
    return decoder.train(method is not None), attachment


def measure(directory: Path, layout: Layout) -> dict[str, Tensor]:
    """`logits` [T, V] of packed documents, `answers` [ANSWER, 2] to a batch of prompts, losses [STEPS] by method."""
    decoder, _ = read_decoder(directory, layout)
    with torch.no_grad():
        logits = next_token_logits(decoder, decoder(IDS, decoder.sequences(LENGTHS)))
    steps = generate_tokens(decoder, list(PROMPTS), max_gen_len=ANSWER, max_seq_len=64, stop_ids=set())
    losses = {method: train(directory, layout, method) for method in METHODS_TRAINED}
    return {"logits": logits, "answers": torch.tensor(list(steps)), **losses}


def train(directory: Path, layout: Layout, method: str) -> Tensor:
    """Mean loss of a repeated batch before each step of AdamW, fp32 [STEPS]."""
    decoder, _ = read_decoder(directory, layout, method)
    slicings = {target.name: target.slicing for target in targets(decoder)}
    parameters = NamedParameters({name: p for name, p in decoder.named_parameters() if p.requires_grad}, slicings)
    optimizer = build_optimizer("adamw", parameters, RATE, 0.0)
    losses = []
    for _ in range(STEPS):
        hidden = decoder(IDS, decoder.sequences(LENGTHS))
        loss = cross_entropy_sum(hidden, decoder.head_weight, IDS.roll(-1), decoder.args.vocab_size) / len(IDS)
        optimizer.zero_grad()
        loss.backward()
        parameters.sum_partial_gradients()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)
