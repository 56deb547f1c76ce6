"""accessory/quantizer/strategy.py against autograd over the whole model, and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accessory.errors import ConfigError
from accessory.export import open_base
from accessory.model.loss import cross_entropy_sum
from accessory.parallel import groups
from accessory.quant import MIXES
from accessory.quantizer.blocks import Blocks, linears
from accessory.quantizer.gptq import DAMPING
from accessory.quantizer.strategy import (
    NARROW,
    WIDE,
    Gain,
    choose,
    measure,
    rounded,
    strategy_document,
    widths_of,
)


def test_most_gain_for_each_weight_first() -> None:
    """A small matrix of less gain may come before a large one; what finds no room is left out, the next may fit."""
    gains = {"a": Gain(10.0, 100), "b": Gain(6.0, 20), "c": Gain(3.0, 25), "d": Gain(0.1, 55)}
    assert choose(gains, 0.25) == {"a": NARROW, "b": WIDE, "c": WIDE, "d": NARROW}
    assert choose(gains, 0.1) == {"a": NARROW, "b": WIDE, "c": NARROW, "d": NARROW}
    assert set(choose(gains, 1.0).values()) == {WIDE}


def test_measured_a_block_at_a_time(tiny_base: Path) -> None:
    """Gains are those of gradients by all linears' outputs at once, in one autograd graph over the whole model."""
    model, _ = open_base([tiny_base])
    blocks = Blocks(model.args, model.tensors, torch.float32, groups.start("cpu"))
    ids = torch.arange(48).view(4, 12) * 7 % 500
    found = {}
    for gains in measure(blocks, ids, 2):
        found |= gains
    expected = by_autograd(blocks, ids)
    assert found.keys() == expected.keys() and len(found) == 7 * len(blocks)
    for name, gain in found.items():
        assert gain.gain == pytest.approx(expected[name], rel=2e-2), name
        assert gain.weights == linears(blocks.load(0))[name.split(".", 2)[2]].weight.numel()


def by_autograd(blocks: Blocks, ids: torch.Tensor) -> dict[str, float]:
    """The sum over rows n of (d loss / d y_n)^2 dW_n H dW_n^T, with y = x W^T from a bias that is added, of zeros."""
    decoder, where = blocks.decoder, blocks.sequences(*ids.shape)
    loaded = [blocks.load(i) for i in range(len(blocks))]
    inputs, outputs = {}, {}
    for index, block in enumerate(loaded):
        for name, linear in linears(block).items():
            linear.weight.requires_grad_(True)
            inputs[f"layers.{index}.{name}"] = linear
    x = decoder.enter(ids.flatten(), where)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        for index, block in enumerate(loaded):
            kept = recorded(block, x, where)
            outputs |= {f"layers.{index}.{name}": pair for name, pair in kept.items()}
            x = kept.pop("result")
            outputs.pop(f"layers.{index}.result")
    labels = torch.full_like(ids, -1)
    labels[:, :-1] = ids[:, 1:]
    loss = cross_entropy_sum(decoder.leave(x), decoder.head_weight, labels.flatten())
    names = list(outputs)
    gradients = torch.autograd.grad(loss, [outputs[name][1] for name in names])
    found = {}
    for name, dy in zip(names, gradients, strict=True):
        weight, of_input = inputs[name].weight.detach(), outputs[name][0].detach().double()
        hessian = (of_input.t() @ of_input).float()
        importance = hessian.diagonal() + DAMPING * hessian.diagonal().mean()
        costs = []
        for bits, group in (NARROW, WIDE):
            d = (rounded(weight, importance, bits, group).weights() - weight).double()
            costs.append(float((dy.double().square().sum(0) * ((d @ hessian.double()) * d).sum(1)).sum()))
        found[name] = costs[0] - costs[1]
    return found


def recorded(block, x: torch.Tensor, where) -> dict:
    """The block written out, LLaMA's: (input, output) of each linear, and `result`."""
    attention, fed = block.attention, block.feed_forward
    kept = {}

    def through(name: str, linear, value: torch.Tensor) -> torch.Tensor:
        y = value @ linear.weight.t()
        kept[name] = (value, y)
        return y

    h = block.attention_norm(x)
    q, k, v = (through(f"attention.{name}", getattr(attention, name), h).view(len(x), -1, attention.head_dim)
               for name in ("wq", "wk", "wv"))  # fmt: skip
    q, k = attention._rotated(q, k, where)
    heads = []
    mask = where.positions[:, None] >= where.positions[None]
    document = torch.repeat_interleave(torch.arange(len(where.lengths)), torch.tensor(where.lengths))
    mask &= document[:, None] == document[None]
    repeat = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // repeat].t() * attention.head_dim**-0.5
        heads.append(scores.masked_fill(~mask, float("-inf")).softmax(1) @ v[:, head // repeat])
    middle = x + through("attention.wo", attention.wo, torch.cat(heads, 1))
    h = block.ffn_norm(middle)
    gated = torch.nn.functional.silu(through("feed_forward.w1", fed.w1, h)) * through("feed_forward.w3", fed.w3, h)
    kept["result"] = middle + through("feed_forward.w2", fed.w2, gated)
    return kept


def test_document() -> None:
    """GreenBit's schema and names."""
    found = strategy_document({"layers.3.attention.wq": WIDE, "layers.3.feed_forward.w2": NARROW})
    assert found == {
        "measurement": {
            "model.layers.3": {
                "q_proj": {"group_size": {"2": 64, "4": 128}, "bits": [4], "bits_prop": [1.0], "scale_bits": 4},
                "down_proj": {"group_size": {"2": 64, "4": 128}, "bits": [2], "bits_prop": [1.0], "scale_bits": 4},
            }
        }
    }


def test_names() -> None:
    assert widths_of("int3_g64") == (3, 64)
    assert all(widths_of(mix) is None for mix in MIXES)
    with pytest.raises(ConfigError, match="--quant_type 'nf4' cannot be calibrated; expected intB_gG"):
        widths_of("nf4")


@pytest.mark.parametrize(
    ("quant_type", "advice"),
    [
        ("nf4", "Leave out --calibrate."),
        ("mix2.7", "Did you mean 'mix2.5'?"),
        ("int2_g63", "Did you mean 'int2_g64'?"),
        (2, "mix2.2, mix2.5, mix3.0."),
    ],
)
def test_advice_for_a_name_that_cannot_be_calibrated(quant_type: object, advice: str) -> None:
    """To leave out --calibrate helps a format that is packed without it alone."""
    with pytest.raises(ConfigError) as error:
        widths_of(quant_type)
    assert str(error.value).endswith(advice)
