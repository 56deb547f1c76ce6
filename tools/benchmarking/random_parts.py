"""Weights and documents that no file holds: of any size, made where they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from accessory.checkpoint.lazy import LazyTensor
from accessory.checkpoint.load import named_generator, targets
from accessory.checkpoint.source import Source
from accessory.data.corpus import Corpus
from accessory.data.omissions import Omissions
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from tools.model_sizes import args_of


@dataclass(frozen=True)
class RandomTensor(LazyTensor):
    """A matrix of deviation 0.02, or a vector of ones; the same at every read, on `device`."""

    name: str
    shape: tuple[int, ...]
    device: torch.device
    dtype: str = "bfloat16"

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """The range is cut out of the whole, which is dropped."""
        if len(self.shape) == 1:
            whole = torch.ones(self.shape, dtype=torch.bfloat16, device=self.device)
        else:
            seed = named_generator(0, self.name).initial_seed()
            generator = torch.Generator(self.device).manual_seed(seed)
            whole = torch.randn(self.shape, generator=generator, dtype=torch.bfloat16, device=self.device).mul_(0.02)
        return whole if dim is None else whole.narrow(dim, start, stop - start).contiguous()


def random_source(model: str, device: torch.device) -> tuple[ModelArgs, Source]:
    """The model whose settings `args_of(model)` knows, as if it were a checkpoint."""
    args = args_of(model)
    places = targets(Decoder(args, dtype=torch.bfloat16))
    tensors = {place.name: RandomTensor(place.name, place.local_shape, device) for place in places}
    return args, Source(Path(model), "random weights", [], tensors, settings=args.model_dump())


def random_corpus(lengths: list[int], supervised: float, vocab_size: int) -> Corpus:
    """Documents of `lengths` random tokens, of which the last `supervised` part is learned."""
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    learned = [np.arange(length) >= length - max(round(supervised * length), 1) for length in lengths]
    arrays = {
        "tokens": np.random.default_rng(0).integers(vocab_size, size=offsets[-1], dtype=np.int32),
        "learned": np.concatenate(learned),
        "offsets": offsets,
        "origins": np.zeros((len(lengths), 3), dtype=np.int32),
    }
    return Corpus(arrays, Omissions(["random documents"]), identity={}, tokenizer=None)
