"""A base of each kind, and what was trained on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from accessory.export import (
    Destination,
    open_base,
)
from accessory.parallel import groups
from tests.checkpoint.trained import write_trained
from tests.conftest import copy_tokenizer
from tests.model.families.matrix import GROUPED, OPT, SIZES, known

VOCABULARY = {"vocab_size": 512}
BASES = {
    "gpt_neox": known("gpt_neox", **SIZES | {"intermediate_size": 256, "initializer_range": 0.1} | VOCABULARY),
    "bloom": known("bloom", hidden_size=128, n_layer=2, n_head=4, initializer_range=0.1, **VOCABULARY),
    "biased": known("llama", **GROUPED | VOCABULARY, attention_bias=True, mlp_bias=True),
    "mistral": known("mistral", **GROUPED | VOCABULARY, sliding_window=None),
    "opt": known("opt", **OPT | VOCABULARY | {"max_position_embeddings": 32}, word_embed_proj_dim=128),
}


@pytest.fixture(scope="module", autouse=True)
def layout() -> Iterator[groups.Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()


@pytest.fixture(scope="module")
def base_of(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of `BASES` -> a checkpoint of it that transformers wrote, with the tiny model's tokenizer."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            BASES[name](made[name])
            copy_tokenizer(tiny_base, made[name])
        return made[name]

    return make


@pytest.fixture(scope="module")
def part(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NormBiasLoRA trained on the plain tiny model."""
    return write_trained(tiny_base, tmp_path_factory.mktemp("trained") / "part")


@pytest.fixture(scope="module")
def nf4_part(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, trained on it in NF4."""
    return write_trained(tiny_base, tmp_path_factory.mktemp("trained") / "part", "nf4")


@pytest.fixture(scope="module")
def packed(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model packed in NF4, in our own format."""
    target = tmp_path_factory.mktemp("packed") / "base"
    model, _ = open_base([tiny_base])
    Destination(dtype="fp32", quant_type="nf4").write(model, target)
    return target
