"""A process group of one, decoders filled at random, and decoders filled from tiny Hugging Face models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from accessory.checkpoint.load import fill, targets
from accessory.method import Attachment
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.parallel import groups
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.quant import storage
from tests.model.families.subject import read_decoder

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,  # logits that differ by more than rounding
}


def normal(shape: tuple[int, ...], deviation: float) -> Callable[[torch.Generator], Tensor]:
    """A maker of starting values: random, of a mean of zero."""
    return lambda generator: deviation * torch.randn(shape, generator=generator)


@pytest.fixture(scope="module", autouse=True)
def layout() -> Iterator[Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()


@pytest.fixture
def random_decoder(layout: Layout) -> Callable[..., Decoder]:
    """(args, dtype, quant, trainable) -> a decoder in training mode with random weights."""

    def make(
        args: ModelArgs, dtype: torch.dtype = torch.float32, quant: str | None = None, trainable: tuple[str, ...] = ()
    ) -> Decoder:
        decoder = Decoder(args, dtype=dtype, storage=storage(quant) if quant else None)
        initial = {target.name: normal(target.whole_shape(1), 0.1) for target in targets(decoder)}
        trained = {name for name in initial if any(part in name for part in trainable)}
        fill(decoder, {}, Attachment(trained, initial), layout, DataParallel(layout, "sdp", base_is_trained=False))
        return decoder.train()

    return make


@pytest.fixture
def pair(layout: Layout, tmp_path: Path) -> Callable[..., tuple[transformers.LlamaForCausalLM, Decoder]]:
    """Changes to a tiny config -> a random transformers model, and a decoder read from its saved checkpoint (fp32)."""

    def make(**changes) -> tuple[transformers.LlamaForCausalLM, Decoder]:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, **changes})).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start as ones and biases as zeros: make them count
                torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
        model.save_pretrained(tmp_path)
        return model, read_decoder(tmp_path, layout)[0]

    return make
