"""Small decoders of every kind of block, what a step of theirs saves, and what is planned for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from accessory.checkpoint.load import fill, targets
from accessory.memory.plan import StepMemory
from accessory.method import METHODS, Attachment
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.loss import cross_entropy_sum
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.quant import storage

SMALL = ModelArgs(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=160, vocab_size=96)
TOKENS = 48
NORM_BIAS: dict = {}
NORM_BIAS_LORA = {"lora_rank": 8}
LORA = {"lora_rank": 8, "norm_tuning": False, "bias_tuning": False}
SETTINGS = {
    "NormBias": NORM_BIAS,
    "NormBiasLoRA": NORM_BIAS_LORA,
    "LoRA": LORA,
    "bias": {"norm_tuning": False},
    "LoRA on wq and wv": {**LORA, "lora_targets": ["wq", "wv"]},
    "LoRA with dropout": {**NORM_BIAS_LORA, "lora_dropout": 0.1},
}
LAYER = {"norm": "layer"}
PLAIN = {"gated": False, "activation": "gelu"}
SHAPES = {
    "OPT": LAYER | PLAIN | {"activation": "relu", "position": "learned", "position_offset": 2},
    "OPT-350m": LAYER
    | PLAIN
    | {
        "activation": "relu",
        "position": "learned",
        "norm_placement": "after",
        "final_norm": False,
        "embedding_dim": 32,
    },
    "BLOOM": LAYER | PLAIN | {"position": "alibi", "embedding_norm": True, "n_kv_heads": 4},
    "GPT-NeoX": LAYER | PLAIN | {"parallel_residual": True, "rotary_dim": 4, "rotary_layout": "halves"},
    "GLM-4": {"norm_placement": "both", "rotary_dim": 8},
    "Qwen 3": {"qk_norm": True, "rotary_layout": "halves", "tie_word_embeddings": True},
    "Mistral": {"sliding_window": 10},
}
"""What the small model has to be for its blocks to be another model's."""


def normal(shape: tuple[int, ...], deviation: float) -> Callable[[torch.Generator], Tensor]:
    """A maker of starting values: random, of a mean of zero."""
    return lambda generator: deviation * torch.randn(shape, generator=generator)


def built(
    args: ModelArgs,
    settings: dict,
    *,
    method: str = "peft",
    quant: str | None = "nf4",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Decoder, Attachment]:
    """A decoder on meta with a method on it."""
    made = METHODS[method](METHODS[method].Settings(**settings))
    decoder = made.decoder(args, dtype=dtype, storage=made.storage_of(storage(quant)) if quant else None)
    attachment = made.attach(decoder)
    made.prepare_training(decoder, attachment)
    return decoder, attachment


def filled(layout: Layout, settings: dict, **options) -> tuple[Decoder, Attachment]:
    """The small decoder with random weights, in training mode."""
    decoder, attachment = built(options.pop("args", SMALL), settings, **options)
    initial = {target.name: normal(target.whole_shape(1), 0.1) for target in targets(decoder)}
    fill(decoder, {}, Attachment(attachment.trainable, initial), layout, DataParallel(layout, "sdp", False))
    return decoder.train(), attachment


class Kept:
    """Bytes of the distinct storages saved for backward while it is entered; parameters and `known` aside."""

    def __init__(self, decoder: Decoder, *known: Tensor) -> None:
        self.known = {t.untyped_storage().data_ptr() for t in (*decoder.parameters(), *known)}
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        store = tensor.untyped_storage()
        if store.data_ptr() not in self.known:
            self.storages[store.data_ptr()] = store  # held, so that no address is used twice
        return tensor

    def __enter__(self) -> Kept:
        self.hooks.__enter__()
        return self

    def __exit__(self, *failure) -> None:
        self.hooks.__exit__(*failure)

    @property
    def bytes(self) -> int:
        """Of all of them together."""
        return sum(store.nbytes() for store in self.storages.values())


def step(decoder: Decoder, lengths: tuple[int, ...] = (TOKENS,)) -> tuple[Kept, Tensor, list[Tensor]]:
    """What a forward over random, all supervised tokens keeps; the loss; each block's output."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(0, 96, (sum(lengths),), generator=generator) for _ in range(2))
    with Kept(decoder) as kept:
        sequences = decoder.sequences(lengths)
        outputs = list(decoder.states(decoder.enter(ids, sequences), sequences))
        loss = cross_entropy_sum(decoder.leave(outputs[-1]), decoder.head_weight, labels, decoder.args.vocab_size)
    return kept, loss, outputs


def planned(decoder: Decoder, attachment: Attachment, layout: Layout, checkpointing: int = 0, **more):
    """The plan of the small step."""
    options = {"tokens": TOKENS, "data_parallel": "sdp", **more}
    return StepMemory(decoder, attachment, layout, **options).plan(checkpointing)
