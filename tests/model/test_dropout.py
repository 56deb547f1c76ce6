"""Dropout on the embedding and in attention: off unless asked for, the same when a block is run again."""

from __future__ import annotations

import pytest
import torch

from accessory.memory.recompute import recompute_layers
from accessory.model.args import ModelArgs
from accessory.model.dropout import dropped
from accessory.model.loss import cross_entropy_sum

ARGS = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=96)
IDS = torch.arange(20) * 7 % 96


def test_dropped() -> None:
    """A share is zero, the others are as much larger; another call chooses others."""
    torch.manual_seed(0)
    x = torch.ones(200, 100, dtype=torch.bfloat16)
    first, second = dropped(x, 0.1), dropped(x, 0.1)
    assert (first == 0).float().mean().item() == pytest.approx(0.1, abs=5e-3)
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.9).bfloat16().item()}
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("embedding", "attention"), [(0.2, 0.0), (0.0, 0.2), (0.1, 0.3)])
def test_in_training_only_and_the_same_when_run_again(random_decoder, embedding: float, attention: float) -> None:
    """Two seeds differ, one repeats; recomputed blocks draw the same numbers; asking draws none."""
    decoder = random_decoder(ARGS, torch.float32, trainable=("",))

    def step(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        decoder.zero_grad(set_to_none=True)
        hidden = decoder(IDS, decoder.sequences((12, 8)))
        cross_entropy_sum(hidden, decoder.head_weight, IDS).backward()
        return [hidden.detach(), *(p.grad.clone() for p in decoder.parameters())]

    decoder.train()
    without = step(1)
    decoder.drop_out(embedding, attention)
    found, other = step(1), step(2)
    assert not torch.allclose(found[0], without[0]) and not torch.allclose(found[0], other[0])
    recompute_layers(decoder, 2, offload=False, device=torch.device("cpu"))
    assert all(map(torch.equal, step(1), found))
    decoder.eval()
    torch.testing.assert_close(step(1), without)
