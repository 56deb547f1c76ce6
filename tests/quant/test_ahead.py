"""Unpacking ahead: the order of two streams that are not there, and results that stay what they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from accessory.kernels.addition import Addition
from accessory.model.projection import project
from accessory.quant import storage
from accessory.quant.ahead import Ahead, unpacking_ahead
from accessory.quant.four_bit import FourBitWeight
from accessory.quant.packed import PackedWeight
from accessory.quant.products import sum_of_products


class Streams:
    """Two streams that only count: marks of the caller's, marks of the other, and which waited for which."""

    def __init__(self) -> None:
        self.main = self.side = 0
        self.waited: list[tuple[int, int]] = []
        self.side_after: list[int] = []
        self.used: list[Tensor] = []
        self.inside = False

    def mark(self) -> int:
        """See `Lanes`."""
        self.main += 1
        return self.main

    @contextmanager
    def beside(self, after: int) -> Iterator[None]:
        """See `Lanes`."""
        self.side_after.append(after)
        self.inside = True
        yield
        self.inside = False

    def mark_beside(self) -> int:
        """See `Lanes`."""
        self.side += 1
        return self.side

    def wait(self, until: int) -> None:
        """See `Lanes`."""
        self.waited.append((self.main, until))

    def used_beside(self, tensor: Tensor) -> None:
        """See `Lanes`."""
        self.used.append(tensor)


def matrices(count: int, quant: str = "nf4") -> list[PackedWeight]:
    """Of different sizes."""
    generator, found = torch.Generator().manual_seed(0), []
    for i in range(count):
        weight = storage(quant)((64, 64 * (1 + i % 2)))
        weight.pack(torch.randn(weight.shape, generator=generator))
        found.append(weight)
    return found


def step(weights: list[PackedWeight]) -> list[Tensor]:
    """A forward over blocks of three, and a backward that recomputes each."""
    made = []

    def forward(weight: PackedWeight) -> None:
        """x W^T."""
        x = torch.linspace(-1, 1, 3 * weight.shape[1]).view(3, -1)
        made.append(sum_of_products([x], [weight], transposed=False))

    for weight in weights:
        forward(weight)
    for top in range(len(weights) - 3, -1, -3):
        for weight in weights[top : top + 3]:
            forward(weight)
        for weight in reversed(weights[top : top + 3]):
            made.append(sum_of_products([torch.ones(2, 64)], [weight], transposed=True))
    return made


def test_a_repeated_step_is_foreseen() -> None:
    """From the second one on, each matrix but the step's first waits for what was unpacked ahead; numbers are equal."""
    weights, streams = matrices(9), Streams()
    wanted, ahead = step(weights), Ahead(streams)
    with unpacking_ahead(ahead):
        for number in range(4):
            found = step(weights)
            assert all(map(torch.equal, found, wanted)), number
            if number == 1:
                ahead.hits = ahead.misses = 0
    assert (ahead.hits, ahead.misses) == (2 * 27, 0)
    for before, after in zip(streams.side_after, streams.side_after[1:], strict=False):
        assert before <= after


def test_no_buffer_is_overwritten_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each unpacking beside comes after the last product that reads its buffer, and each product after its matrix."""
    weights, streams = matrices(6), Streams()
    ahead, reads, inside = Ahead(streams), {}, []
    ours, looking = Ahead.unpack, Ahead.look_ahead

    def unpack(self: Ahead, matrix: PackedWeight, dtype: torch.dtype) -> Tensor:
        """Whoever is given a buffer reads it in the caller's order, behind the mark that is made first."""
        buffer = ours(self, matrix, dtype)
        reads[buffer.data_ptr()] = streams.main
        return buffer

    def look(self: Ahead) -> None:
        """What is unpacked beside goes into the other buffer, after its last reader's successor was asked for."""
        count = len(streams.side_after)
        looking(self)
        if len(streams.side_after) > count:
            place = self._buffers[self._unpacked.place].data_ptr()
            inside.append((reads.get(place, 0), streams.side_after[-1]))
            assert place != self._buffers[self._place].data_ptr()

    monkeypatch.setattr(Ahead, "unpack", unpack)
    monkeypatch.setattr(Ahead, "look_ahead", look)
    with unpacking_ahead(ahead):
        for _ in range(3):
            step(weights)
    assert len(inside) > 20 and all(read < after for read, after in inside)
    assert all(until <= streams.side for _, until in streams.waited)


def test_wrong_guesses_change_nothing() -> None:
    """Another order, another dtype, and matrices that were changed since."""
    weights, ahead = matrices(6), Ahead(Streams())
    orders = [weights, weights[::-1], weights[::2], weights, weights[1:]]
    with unpacking_ahead(ahead):
        for dtype in (torch.float32, torch.bfloat16):
            for order in orders:
                for weight in order:
                    x = torch.ones(2, weight.shape[1], dtype=dtype)
                    found = sum_of_products([x], [weight], transposed=False)
                    assert torch.equal(found, x @ weight.unpack(dtype).t())


def test_a_wrong_guess_is_over_before_its_buffer_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the caller, who has not foreseen what comes next either: it would be overwritten by the late guess."""
    weights, streams, guesses, checked = matrices(16)[::2], Streams(), {}, []  # all of one size
    ours = FourBitWeight.unpack_into

    def unpack_into(self: FourBitWeight, out: Tensor) -> Tensor:
        """Into a buffer that nothing beside still writes to."""
        if streams.inside:
            guesses[out.data_ptr()] = streams.side + 1
        elif guess := guesses.get(out.data_ptr()):
            checked.append(guess <= max((until for _, until in streams.waited), default=0))
        return ours(self, out)

    monkeypatch.setattr(FourBitWeight, "unpack_into", unpack_into)
    with unpacking_ahead(Ahead(streams)):
        for weight in (*weights[:4] * 6, *weights[4:] * 2):
            sum_of_products([torch.ones(1, weight.shape[1])], [weight], transposed=False)
    assert len(checked) > 2 and all(checked)


def test_changed_matrices_are_unpacked_again() -> None:
    """What was unpacked ahead is not used; and one whose parts are others now, as of a sharded one, is left."""
    (first, second), ahead = (matrices(1)[0], matrices(1)[0]), Ahead(Streams())
    x = torch.ones(1, 64)
    with unpacking_ahead(ahead):
        for _ in range(12):
            for weight in (first, second):
                sum_of_products([x], [weight], transposed=False)
        assert ahead._unpacked.matrix is first
        with torch.no_grad():
            first.nested_scales.mul_(2)
        hits = ahead.hits
        found = sum_of_products([x], [first], transposed=False)
        assert ahead.hits == hits and torch.equal(found, x @ first.unpack(torch.float32).t())
        held = second.codes
        sum_of_products([x], [second], transposed=False)
        second.codes = torch.nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        sum_of_products([x], [first], transposed=False)
        assert ahead._unpacked is None
        second.codes = held
        assert torch.equal(sum_of_products([x], [second], transposed=False), x @ second.unpack(torch.float32).t())


def test_larger_matrices_get_new_buffers() -> None:
    """The old ones are not used again before the second stream is done with them."""
    streams = Streams()
    small, (_, large) = matrices(1)[0], matrices(2)
    with unpacking_ahead(Ahead(streams)):
        for weight in (small, small, small, large, large, large):
            sum_of_products([torch.ones(1, weight.shape[1])], [weight], transposed=False)
    assert len(streams.used) == 4  # two of each size


def test_gradients_through_a_projection() -> None:
    """Forward and backward of linears that share an input, with LoRA."""
    weights, generator = matrices(1) + matrices(1), torch.Generator().manual_seed(1)
    factors = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((4, 64), (64, 4))]
    results = []
    for ahead in (None, Ahead(Streams())):
        with unpacking_ahead(ahead):
            for _ in range(3):
                x = torch.linspace(-1, 1, 128).view(2, 64).requires_grad_()
                made = project(x, weights, [Addition(a=factors[0], b=factors[1]), Addition()])
                results.append(torch.autograd.grad(sum(y.square().sum() for y in made), [x, *factors]))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
