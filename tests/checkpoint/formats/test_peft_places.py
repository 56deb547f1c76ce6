"""Where an adapter's tensors belong: the modules of transformers' own models, one by one."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from accessory.checkpoint.formats.peft_places import places_of
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import model_args_of
from accessory.model.families import architecture_of
from tests.checkpoint.formats.peft_models import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_and_norm_of_theirs_has_a_place(name: str, base_of) -> None:
    """By name and size; those that hold several of ours give each row to one of them."""
    args = model_args_of(open_source(base_of(name)))
    places = places_of(args, architecture_of(args.architecture, name).names)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]())
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    found = {n: (linear.out_features, linear.in_features) for n, linear in places.theirs.items()}
    assert found == {n: (m.out_features, m.in_features) for n, m in linears.items()}
    assert sorted(part for linear in places.theirs.values() for part in linear.parts) == sorted(places.linears)
    for their, linear in places.theirs.items():
        assert torch.cat(linear.rows).sort().values.equal(torch.arange(linear.out_features))
        shapes = [places.linears[part] for part in linear.parts]
        assert shapes == [(len(rows), linear.in_features) for rows in linear.rows]
        assert {part in places.biased for part in linear.parts} == {linears[their].bias is not None}
    norms = [m for m in model.modules() if type(m).__name__.endswith("Norm")]
    assert sorted(places.norms.values()) == sorted(len(p) for norm in norms for p in norm.parameters())
