"""Inputs moved to the host and back: the same gradients to the bit, and no more on the device than is said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.offload import InputOffload

ARGS = ModelArgs(dim=64, n_layers=5, n_heads=4, n_kv_heads=2, hidden_dim=160, vocab_size=96)
CPU = torch.device("cpu")


@pytest.fixture
def decoder(random_decoder: Callable[..., Decoder]) -> Decoder:
    """Five blocks whose norms and value matrices are trained, all run again in the backward."""
    made = random_decoder(ARGS, trainable=("norm", "wv.weight")).train()
    for block in made.layers:
        block.recompute = True
    return made


def offloaded(decoder: Decoder, layers: int = 5) -> Decoder:
    """Its first `layers` blocks' inputs are moved."""
    inputs = InputOffload(CPU)
    for i, block in enumerate(decoder.layers):
        block.recompute, block.offload = i < layers, inputs if i < layers else None
    return decoder


def loss_of(decoder: Decoder, seed: int, outputs: list[StorageWeakRef] | None = None) -> Tensor:
    """A number that depends on all of the decoder's work on random ids; the blocks' outputs are noted, not held."""
    ids = torch.randint(0, 96, (12,), generator=torch.Generator().manual_seed(seed))
    sequences = decoder.sequences((7, 5))
    for x in decoder.states(decoder.enter(ids, sequences), sequences):
        if outputs is not None:
            outputs.append(StorageWeakRef(x.untyped_storage()))
    return decoder.leave(x).square().sum()


def gradients(decoder: Decoder, *losses: Tensor, **options: bool) -> list[Tensor]:
    """Summed over backwards through `losses`, in their order."""
    decoder.zero_grad(set_to_none=True)
    for loss in losses:
        loss.backward(**options)
    return [p.grad for p in decoder.parameters() if p.grad is not None]


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    """To the bit."""
    return len(one) == len(two) > 10 and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_gradients_are_the_same(decoder: Decoder, layers: int) -> None:
    """However many blocks' inputs are moved; and over again, with the same object."""
    expected = [gradients(decoder, loss_of(decoder, seed)) for seed in (0, 1)]
    offloaded(decoder, layers)
    for seed in (0, 1):
        assert equal(gradients(decoder, loss_of(decoder, seed)), expected[seed])
    assert not equal(expected[0], expected[1])


@pytest.mark.parametrize("first", [0, 1])
def test_several_forwards_before_a_backward(decoder: Decoder, first: int) -> None:
    """Whichever of them goes back first."""
    losses = [loss_of(decoder, seed) for seed in (0, 1)]
    expected = gradients(decoder, losses[first], losses[1 - first])
    offloaded(decoder)
    losses = [loss_of(decoder, seed) for seed in (0, 1)]
    assert equal(gradients(decoder, losses[first], losses[1 - first]), expected)


def test_forward_that_is_given_up(decoder: Decoder) -> None:
    """One without a backward, and one of asking, leave nothing behind for the next."""
    expected = gradients(decoder, loss_of(decoder, 0))
    offloaded(decoder)
    loss_of(decoder, 1)
    with torch.no_grad():
        loss_of(decoder, 2)
    assert equal(gradients(decoder, loss_of(decoder, 0)), expected)


def test_backward_twice(decoder: Decoder) -> None:
    """Through one graph: what was brought back once is brought back again."""
    expected = gradients(decoder, *[loss_of(decoder, 0)] * 2, retain_graph=True)
    offloaded(decoder)
    assert equal(gradients(decoder, *[loss_of(decoder, 0)] * 2, retain_graph=True), expected)


@pytest.mark.parametrize("layers", [5, 3])
def test_only_the_newest_input_stays(decoder: Decoder, layers: int) -> None:
    """After the forward; without the offload, every one does."""
    outputs: list[StorageWeakRef] = []
    loss = loss_of(decoder, 0, outputs)
    assert [ref.expired() for ref in outputs[:4]] == [False] * 4
    del loss
    outputs.clear()
    loss = loss_of(offloaded(decoder, layers), 0, outputs)
    moved = layers - 2  # output i is the input of block i + 1; the newest moved block keeps its own
    assert [ref.expired() for ref in outputs[:4]] == [i < moved for i in range(4)]
    loss.backward()


def test_the_one_before_is_fetched_too() -> None:
    """In the backward's order: while an input is in use the one before it is on its way, and no other."""
    inputs = [torch.full((3,), float(i)) for i in range(4)]
    offload = InputOffload(CPU)
    kept = [offload._keep(x) for x in inputs]
    assert [one.here is None for one in kept] == [True, True, True, False]
    for i in (3, 2, 1, 0):
        assert torch.equal(kept[i].wanted(), inputs[i])
        assert [one.here is not None for one in kept[:3]] == [j == i - 1 for j in range(3)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_either_kind_of_checkpoint(reentrant: bool) -> None:
    """PyTorch's reentrant one and the other, with dropout, which both draw again as they drew it."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.5)) for _ in range(4)]
    x = torch.randn(6, 8, requires_grad=True)

    def run(offload: InputOffload | None) -> list[Tensor]:
        torch.manual_seed(1)
        y = x
        for layer in layers:
            if offload is None:
                y = layer(y)
            else:
                with offload:
                    y = checkpoint(layer, y, use_reentrant=reentrant)
        return list(torch.autograd.grad(y.sum(), [x])) if not reentrant else _backward(y, x)

    expected, found = run(None), run(InputOffload(CPU))
    assert torch.equal(expected[0], found[0])
    assert expected[0].abs().sum() > 0


def _backward(y: Tensor, x: Tensor) -> list[Tensor]:
    """The reentrant checkpoint knows `backward` only."""
    x.grad = None
    y.sum().backward()
    return [x.grad]
