"""accessory/quantizer/sensitivity.py against autograd over the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accessory.export import open_base
from accessory.model.loss import cross_entropy_sum
from accessory.parallel import groups
from accessory.quantizer.blocks import Blocks, linears
from accessory.quantizer.folder import Folder
from accessory.quantizer.gptq import DAMPING
from accessory.quantizer.sensitivity import measure, rounded
from accessory.quantizer.strategy import NARROW, WIDE


@pytest.fixture
def blocks(tiny_base: Path) -> Blocks:
    """Of the tiny base, in fp32."""
    model, _ = open_base([tiny_base])
    return Blocks(model.args, model.tensors, torch.float32, groups.start("cpu"))


IDS = torch.arange(48).view(4, 12) * 7 % 500


def test_measured_a_block_at_a_time(blocks: Blocks, tmp_path: Path) -> None:
    """Gains are those of gradients by all linears' outputs at once, in one autograd graph over the whole model."""
    found = measure(blocks, IDS, 2, Folder(tmp_path, 0, groups.data_parallel_group()), lambda _: None)
    expected = by_autograd(blocks, IDS)
    assert found.keys() == expected.keys() and len(found) == 7 * len(blocks)
    for name, gain in found.items():
        assert gain.gain == pytest.approx(expected[name], rel=2e-2), name
        assert gain.weights == linears(blocks.load(0))[name.split(".", 2)[2]].weight.numel()
    assert not list(tmp_path.glob("*.bin"))


def test_goes_on_where_it_was_stopped(blocks: Blocks, tmp_path: Path) -> None:
    """What was measured is kept: the second run measures the first block alone, and its gains are the same."""

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    folders = [Folder(tmp_path / name, 0, groups.data_parallel_group()) for name in ("stopped", "whole")]
    for folder in folders:
        folder.path.mkdir()
    with pytest.raises(KeyboardInterrupt):
        measure(blocks, IDS, 2, folders[0], stop)
    lines: list[str] = []
    found = measure(blocks, IDS, 2, folders[0], lines.append)
    assert lines == ["sensitivity of block   2/2"]
    assert found == measure(blocks, IDS, 2, folders[1], lines.append)


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
