"""Where the tensors of a PEFT adapter belong in a model of ours, and what PEFT calls those places."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accessory.checkpoint.naming import part_rows
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.families.architecture import Fused, Names
from accessory.model.linear import Linear
from accessory.model.norm import Norm

PREFIX = "base_model.model."
"""What all names in an adapter's file begin with."""


@dataclass(frozen=True)
class TheirLinear:
    """One linear of theirs: its full name there, the linears of ours in it, and which of its rows each has."""

    name: str
    parts: tuple[str, ...]
    rows: tuple[torch.Tensor, ...]
    in_features: int

    @property
    def out_features(self) -> int:
        """Rows of its weight."""
        return sum(map(len, self.rows))


@dataclass(frozen=True)
class Places:
    """Everything in a model that an adapter may touch.

    linears: our name -> (out, in). biased: those that the base has a bias on. norms: parameter name -> its channels.
    theirs: full name there -> what it is.
    """

    linears: dict[str, tuple[int, int]]
    biased: frozenset[str]
    norms: dict[str, int]
    theirs: dict[str, TheirLinear]


def places_of(args: ModelArgs, names: Names) -> Places:
    """List the places of a model with the settings `args`; `names` gives their names in Hugging Face files."""
    # The vocabulary has no place here, and a file of Meta's does not say how large it is.
    decoder = Decoder(args.model_copy(update={"vocab_size": 1}), dtype=torch.float32)
    linears: dict[str, tuple[int, int]] = {}
    biased, norms = set(), {}
    for name, module in decoder.named_modules():
        if isinstance(module, Linear):
            linears[name] = (module.out_features, module.in_features)
            biased |= {name} if module.bias is not None else set()
        elif isinstance(module, Norm):
            norms |= {f"{name}.{leaf}": len(value) for leaf, value in module.named_parameters()}
    theirs = {}
    for name, (out, width) in linears.items():
        if found := names.theirs(name):
            their, our = found
            parts, rows = (our.parts, part_rows(our, args)) if isinstance(our, Fused) else ((our,), [torch.arange(out)])
            theirs[their] = TheirLinear(their, parts, tuple(rows), width)
    return Places(linears, frozenset(biased), norms, theirs)
