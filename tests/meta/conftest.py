"""A checkpoint of a tiny model, and the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from accessory.meta import MetaModel
from accessory.parallel import groups
from tests.meta.byte_models import TINY, write_tokenizer


@pytest.fixture(scope="module", autouse=True)
def layout() -> Iterator[groups.Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., transformers.PreTrainedModel]:
    """Changes to the tiny config -> a random model, saved with its tokenizer in `tmp_path`."""

    def make(kind: str = "Llama", seed: int = 0, **changes) -> transformers.PreTrainedModel:
        torch.manual_seed(seed)
        config = getattr(transformers, kind + "Config")(**{**TINY, **changes})
        model = getattr(transformers, kind + "ForCausalLM")(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start as ones and biases as zeros: make them count
                torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
        model.save_pretrained(tmp_path)
        write_tokenizer(tmp_path)
        return model

    return make


@pytest.fixture
def model(checkpoint, tmp_path: Path) -> MetaModel:
    """The first of the family, loaded in fp32."""
    checkpoint()
    return MetaModel.from_pretrained(tmp_path, dtype="fp32")
