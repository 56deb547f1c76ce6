"""What new weights start as: GPT-2's spreads, equal for equal seeds and names, whatever is cut."""

from __future__ import annotations

import pytest
import torch

from accessory.checkpoint.from_scratch import start_values
from accessory.checkpoint.load import named_generator, targets
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder

ARGS = {"dim": 64, "n_layers": 8, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 256, "vocab_size": 512}


@pytest.mark.parametrize("more", [{}, {"norm": "layer", "position": "learned", "qkv_bias": True, "gated": False}])
def test_every_parameter_has_its_spread(more: dict) -> None:
    decoder = Decoder(ModelArgs(**ARGS, **more), dtype=torch.float32)
    values = start_values(decoder)
    shapes = {target.name: target.whole_shape(1) for target in targets(decoder)}
    assert values.keys() == shapes.keys()
    for name, make in values.items():
        value = make(named_generator(3, name))
        assert value.shape == shapes[name] and value.dtype == torch.float32
        if value.dim() == 1:
            assert value.unique().tolist() == [0.0 if name.endswith(".bias") else 1.0]
        else:
            narrow = name.endswith(("wo.weight", "w2.weight"))
            assert value.std().item() == pytest.approx(0.02 / 4 if narrow else 0.02, rel=0.05)
            assert abs(value.mean().item()) < 1e-3
        assert torch.equal(value, make(named_generator(3, name)))
    twins = [
        values[f"layers.{n}.attention.wq.weight"](named_generator(3, f"layers.{n}.attention.wq.weight")) for n in (0, 1)
    ]
    assert not torch.equal(*twins)


def test_ranks_that_share_a_model_start_from_whole_tensors() -> None:
    name = "layers.0.feed_forward.w1.weight"
    halves = start_values(Decoder(ModelArgs(**ARGS), dtype=torch.float32, rank=1, ranks=2))
    whole = start_values(Decoder(ModelArgs(**ARGS), dtype=torch.float32))
    assert torch.equal(halves[name](named_generator(0, name)), whole[name](named_generator(0, name)))
