"""What a written model computes, here and in transformers, and models to write."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from accessory.export import (
    Destination,
    merge,
    open_whole,
)
from accessory.meta import MetaModel
from tests.conftest import copy_tokenizer
from tests.model.families.matrix import Reference

TOKENS = torch.arange(40) * 7 % 500
TOLERANCE = 2e-5  # of the largest logit, fp32


def ours(*paths: Path, **options) -> Tensor:
    """Logits of a checkpoint here, [T, V] fp32."""
    return MetaModel.from_pretrained(list(paths), dtype="fp32", **options).logits(TOKENS, (len(TOKENS),))


@torch.no_grad()
def theirs(path: Path) -> Tensor:
    """The same of transformers, which must have found a place for every tensor, and a tensor for every place."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model(TOKENS[None]).logits[0]


def apart(first: Tensor, second: Tensor) -> float:
    """Largest difference, as a share of the largest logit."""
    return float((first - second).abs().max() / second.abs().max())


def written(
    paths: list[Path], target: Path, to: str = "hf", *, base: str | None = None, drop_biases: bool = False
) -> Path:
    """`paths` merged in fp32."""
    merge(paths, target, Destination(to, "fp32", gguf_type="f32"), base=base, drop_biases=drop_biases)
    return target


def saved_whole(part: Path, target: Path) -> Path:
    """A trained part and its base in one directory, as main_finetune.py writes them."""
    source, _, _ = open_whole([part])
    shutil.copytree(part, target)
    (target / "trainable.safetensors").unlink()
    save_file({name: tensor.read().clone() for name, tensor in source.tensors.items()}, target / "model.safetensors")
    return target


def written_by(write: Callable[[Path], Reference], tiny_base: Path, directory: Path) -> Reference:
    """What `write` makes in the new `directory`, with the tiny model's tokenizer beside it; returns its reference."""
    directory.mkdir()
    copy_tokenizer(tiny_base, directory)
    return write(directory)
