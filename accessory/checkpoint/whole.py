"""A complete model to be written, and what the writers of all formats have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from accessory.checkpoint.lazy import LazyTensor
from accessory.checkpoint.naming import Tensors, in_rotary_layout
from accessory.errors import CheckpointError
from accessory.model.args import ModelArgs
from accessory.tokenizer import Tokenizer
from accessory.tokenizer.sniff import what_is
from accessory.vision import Vision


@dataclass(frozen=True)
class WholeModel:
    """Settings, tensors by our names (unread, in the settings' rotary layout) and tokenizer of a complete model.

    prompt_layouts, system: as `trained_prompt_layouts` and `trained_system` give them. vision: the image encoder, whose
    tensors are among them.
    """

    args: ModelArgs
    tensors: Tensors
    tokenizer: Tokenizer
    prompt_layouts: tuple[str, ...] = ()
    system: str | None = None
    vision: Vision | None = None

    def in_layout(self, rotary_layout: str) -> WholeModel:
        """The same model with q and k in another rotary layout."""
        tensors = in_rotary_layout(self.tensors, self.args, self.args.rotary_layout, rotary_layout)
        return replace(self, args=self.args.model_copy(update={"rotary_layout": rotary_layout}), tensors=tensors)


def refuse_existing(target: Path) -> None:
    """Raise `CheckpointError` if something lies at `target`: it would be replaced whole."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: found {what_is(target)} there; expected a new or empty directory.")


def progress(tensors: Tensors, task: str) -> Iterator[tuple[str, LazyTensor]]:
    """Names and tensors one at a time, behind a progress bar that says `task`."""
    return iter(tqdm(tensors.items(), desc=task, unit="tensor", disable=None))


def read_as(tensor: LazyTensor, dtype: torch.dtype) -> Tensor:
    """The whole tensor in `dtype`: a copy, since a tensor that is read may share its file's memory."""
    return tensor.read().to(dtype, copy=True)
