"""Whole numbers of packed weights move between optimizer steps: proposed, tried on new documents, kept or taken back.

Each matrix keeps a displacement that the optimizer trains (`accessory.quant.moving_groups`). Every few steps, the best
move of each row is found where rounding to the nearest asks for it and the loss's series says that it gains. Those that
gain most are made together, at most a stated share of a matrix, and as many as the series can be trusted with: they
are tried on the documents of a step that had no part in the proposal. If the loss falls by a good part of what was
expected they stay, and more is dared the next time; else they are taken back, and less is dared (a trust region:
Conn, Gould and Toint 2000). Either way the displacement loses what was granted or refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.checkpoint.training_state import WorkingValues
from accessory.method import IntegerRule
from accessory.model.decoder import Decoder
from accessory.model.linear import Linear
from accessory.optim import BETAS, map_first_moment, moments
from accessory.parallel.agree import highest
from accessory.parallel.data import as_shard, is_sharded, local, shard_like, sum_over_data_parallel, whole
from accessory.parallel.groups import Layout
from accessory.parallel.parameters import NamedParameters
from accessory.parallel.tensor import WHOLE, reduce_over_model_parallel
from accessory.quant.moves import Integers, Moves, best_moves, round_released, usual_columns
from accessory.quant.moving_groups import BASIS, WISH, MovingIntegers, Sketch

TRUSTED, MOST_TRUSTED = 1e-3, 1e-2
"""The share of the loss that the first moves may be expected to save, and any."""
SMALLER, LARGER = 0.5, 2.0
"""What that share is multiplied by after moves that were taken back, and after moves that were kept."""
BORNE_OUT = 0.25
"""The part of what was expected that moves must save to be kept."""
NOISE = 0.25  # of the dtype's eps: any change of a weight changes the loss by about this share of it, by rounding alone
WIDTHS = 5  # bits of a whole number are below
ZEROS_EVERY = 5  # steps between the shifts of zeros in the released rule


@dataclass
class Matrix:
    """A linear's weight whose whole numbers move, of `rows` and `columns` in all; offset: of this rank's first row."""

    name: str
    weight: MovingIntegers
    rows: int
    columns: int
    offset: int

    @staticmethod
    def of(name: str, linear: Linear, layout: Layout) -> Matrix:
        """The weight of the linear `name`."""
        rows, columns = linear.weight.slicing.whole_shape(tuple(linear.weight.shape), linear.ranks)
        own = linear.weight.shape[0]
        return Matrix(f"{name}.weight", linear.weight, rows, columns, layout.mp_rank * own if own < rows else 0)

    def own_columns(self, layout: Layout) -> slice:
        """Those of this rank."""
        own = self.weight.shape[1]
        start = layout.mp_rank * own if own < self.columns else 0
        return slice(start, start + own)

    @property
    def numbers(self) -> int:
        """Whole numbers of the whole matrix."""
        return self.rows * self.columns


class Proposal(NamedTuple):
    """Moves of one matrix: `rows` int64 [M] of this rank's, and those of `moves` that are theirs, [M] each."""

    matrix: Matrix
    rows: Tensor
    moves: Moves


class IntegerMoves:
    """Moves the whole numbers of a decoder's matrices, between the steps of `optimizer`."""

    def __init__(self, decoder: Decoder, rule: IntegerRule, layout: Layout) -> None:
        self.rule, self.layout, self.noise = rule, layout, NOISE * torch.finfo(decoder.dtype).eps
        self.matrices = [
            Matrix.of(name, linear, layout)
            for name, linear in decoder.named_modules()
            if isinstance(linear, Linear) and isinstance(linear.weight, MovingIntegers)
        ]
        self.numbers = dict.fromkeys(sorted({matrix.weight.bits for matrix in self.matrices}), 0)
        for matrix in self.matrices:
            self.numbers[matrix.weight.bits] += matrix.numbers
        # The share of the loss that is trusted at present, the running mean (as Adam's) of what clipping multiplied
        # gradients by, then moves proposed and moves kept, by width.
        self.counters = torch.zeros(2 + 2 * WIDTHS, dtype=torch.float64)
        self.counters[0] = max(TRUSTED, 2 * self.noise)
        self.moves_now = False
        self._state: list[Tensor] = []

    @property
    def working(self) -> WorkingValues:
        """What a run must find again to go on."""
        parameters, slicings = {}, {}
        for matrix in self.matrices:
            parameters |= {f"{matrix.name}.{part}": getattr(matrix.weight, part) for part in (WISH, BASIS)}
            slicings |= {f"{matrix.name}.{WISH}": matrix.weight.slicing, f"{matrix.name}.{BASIS}": WHOLE}
        return WorkingValues(NamedParameters(parameters, slicings), self.counters)

    def begin(self, step: int) -> None:
        """Before the step with this number, from 0: have the matrices observe what will be needed of it."""
        renews = step % self.rule.basis_every == 0
        self.moves_now = self.rule.gated and step > 0 and step % self.rule.every == 0
        self._state = self._random_state() if self.moves_now else []
        for matrix in self.matrices if renews else ():
            matrix.weight.wish.sketch = Sketch(partial(self._test, matrix))

    def _test(self, matrix: Matrix) -> Tensor:
        """This rank's rows of a random matrix that the whole dW is multiplied by: [N, R], or [K, R]."""
        wish, (rows, columns) = matrix.weight.wish, matrix.weight.shape
        start, size, total = matrix.offset, rows, matrix.rows
        if not wish.of_columns:
            start, size, total = matrix.own_columns(self.layout).start, columns, matrix.columns
        drawn = torch.randn(total, wish.rank, generator=torch.Generator().manual_seed(total))
        return drawn[start : start + size].to(self.layout.device)

    @torch.no_grad()
    def move(self, optimizer: torch.optim.Optimizer, loss: float, tokens: float, again: Callable[[], float]) -> None:
        """Propose moves, and keep them if they lower the `loss` of this step, which `again` computes. A collective.

        tokens: whose mean loss it is.
        """
        if not self.moves_now:
            return
        usual = self._usual(optimizer)
        found = [self._best(*of_matrix, optimizer, tokens) for of_matrix in zip(self.matrices, usual, strict=True)]
        proposals, expected = self._chosen(found, self.counters[0].item() * loss)
        count = self._count(proposals)
        if not any(count.values()):
            return
        for proposal in proposals:
            _make(proposal, proposal.moves.by)
        now = self._random_state()
        self._set_random_state(self._state)  # the same dropout as before
        enough = max(BORNE_OUT * expected, self.noise * loss)
        taken_back = bool(highest([int(not loss - again() > enough)])[0])
        self._set_random_state(now)
        for proposal in proposals:
            if taken_back:
                _make(proposal, -proposal.moves.by)
            _grant(proposal, proposal.moves.wished if taken_back else proposal.moves.size)
        self._record(count, 0 if taken_back else 1)
        trusted = self.counters[0].item() * (SMALLER if taken_back else LARGER)
        self.counters[0] = min(max(trusted, 2 * self.noise), MOST_TRUSTED)

    def clipped_by(self, factor: float) -> None:
        """The optimizer has stepped on gradients that clipping multiplied by `factor`."""
        self.counters[1] = BETAS[0] * self.counters[1] + (1 - BETAS[0]) * factor

    @torch.no_grad()
    def end(self, optimizer: torch.optim.Optimizer, step: int, skipped: bool) -> None:
        """After the step with this number: new bases where they are due; all of the released rule. A collective.

        skipped: the step's gradient was not finite, and it changed nothing.
        """
        for matrix in self.matrices:
            sketch, matrix.weight.wish.sketch = matrix.weight.wish.sketch, None
            if skipped:
                continue
            if not self.rule.gated:
                self._round_released(matrix, (step + 1) % ZEROS_EVERY == 0)
            if sketch:
                self._renew_basis(matrix, sketch, optimizer)

    def figures(self) -> dict[str, float]:
        """By name: the share of whole numbers of each width that were moved, moves proposed and kept so far."""
        proposed, kept = self.counters[2:].split(WIDTHS)
        found = {f"moved_int{bits}": kept[bits].item() / numbers for bits, numbers in self.numbers.items()}
        return found | {"moves_proposed": proposed.sum().item(), "moves_kept": kept.sum().item()}

    def _usual(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Of each matrix, which of this rank's columns have gradients like others'."""
        energies = []
        for matrix in self.matrices:
            _, square = _whole_moments(optimizer, matrix.weight.displacement)
            rows, columns = _factors(matrix.weight, square, whole(matrix.weight.basis).square())
            energies.append(torch.zeros(matrix.columns, device=self.layout.device))
            energies[-1][matrix.own_columns(self.layout)] = rows.sum(0) @ columns
        sizes = [len(energy) for energy in energies]
        energy = reduce_over_model_parallel(torch.cat(energies))
        return [usual_columns(of_matrix)[matrix.own_columns(self.layout)]
                for matrix, of_matrix in zip(self.matrices, energy.split(sizes), strict=True)]  # fmt: skip

    def _best(self, matrix: Matrix, usual: Tensor, optimizer: torch.optim.Optimizer, tokens: float) -> Moves:
        weight, parameter = matrix.weight, matrix.weight.displacement
        clipped = self.counters[1].item() / (1 - BETAS[0] ** int(optimizer.state[parameter]["step"]))
        mean, square = _whole_moments(optimizer, parameter)
        basis = whole(weight.basis)
        per_weight = 1 / (weight.unit * clipped)  # from U's gradient, clipped, to the weights'
        return best_moves(
            _integers(weight),
            _factors(weight, whole(parameter) * weight.unit, basis),
            _factors(weight, mean * per_weight, basis),
            _factors(weight, square * per_weight**2, basis.square()),
            usual,
            tokens,
            (1 - BETAS[0]) / (1 + BETAS[0]),
        )

    def _chosen(self, found: list[Moves], trusted: float) -> tuple[list[Proposal], float]:
        """The moves that gain most, over all matrices, as long as they are expected to save `trusted`; what they save.

        Of a row that is cut, the rank whose move gains most has it.
        """
        sizes = [matrix.rows for matrix in self.matrices]
        best = torch.cat([moves.gain.new_zeros(size) for moves, size in zip(found, sizes, strict=True)])
        for gain, matrix, moves in zip(best.split(sizes), self.matrices, found, strict=True):
            gain[matrix.offset : matrix.offset + len(moves.gain)] = moves.gain
        reduce_over_model_parallel(best, dist.ReduceOp.MAX)
        kept = best.clone()
        for gain, matrix in zip(kept.split(sizes), self.matrices, strict=True):
            count = min(max(round(self.rule.most_moved * matrix.numbers), 1), matrix.rows)
            gain[gain < gain.topk(count).values[-1]] = 0
        ordered = kept.sort(descending=True).values
        # On the host, which needs the result anyway: CUDA's cumulative sum has no fixed order.
        count = max(int((ordered.double().cpu().cumsum(0) <= trusted).sum()), 1)
        kept[kept < ordered[count - 1]] = 0
        proposals = []
        for matrix, moves, gain in zip(self.matrices, found, kept.split(sizes), strict=True):
            own = gain[matrix.offset : matrix.offset + len(moves.gain)]
            rows = ((moves.gain > 0) & (moves.gain == own)).nonzero()[:, 0]
            proposals.append(Proposal(matrix, rows, Moves(*(part[rows] for part in moves))))
        return proposals, kept.double().sum().item()

    def _count(self, proposals: list[Proposal]) -> dict[int, int]:
        """Moves by width, over all ranks."""
        count = torch.zeros(WIDTHS, dtype=torch.int64, device=self.layout.device)
        for proposal in proposals:
            count[proposal.matrix.weight.bits] += len(proposal.rows)
        reduce_over_model_parallel(count)
        return {bits: int(count[bits]) for bits in self.numbers}

    def _record(self, count: dict[int, int], kept: int) -> None:
        for bits, number in count.items():
            self.counters[2 + bits] += number
            self.counters[2 + WIDTHS + bits] += number * kept

    def _renew_basis(self, matrix: Matrix, seen: Sketch, optimizer: torch.optim.Optimizer) -> None:
        """A basis of what the last step's dW spans; displacement and mean gradient are put into it."""
        weight = matrix.weight
        sketch = reduce_over_model_parallel(sum_over_data_parallel(seen.total))
        former, parameter = whole(weight.basis), weight.displacement
        basis, r = torch.linalg.qr(sketch.double())
        basis = (basis * torch.where(r.diagonal() < 0, -1, 1)).float()
        turn = former.t() @ basis

        def turned(values: Tensor) -> Tensor:
            """What `values` of U's shape become."""
            return values @ turn if weight.wish.of_columns else turn.t() @ values

        def shard_turned(values: Tensor) -> Tensor:
            """The same of this rank's shard of them."""
            entire = whole(as_shard(values, parameter)) if is_sharded(parameter) else values
            return local(shard_like(turned(entire), parameter))

        map_first_moment(optimizer, parameter, shard_turned)
        _write(parameter, turned(whole(parameter)))
        _write(weight.basis, basis)

    def _round_released(self, matrix: Matrix, shifts_zeros: bool) -> None:
        weight = matrix.weight
        wished = _factors(weight, whole(weight.displacement) * weight.unit, whole(weight.basis))
        integers = _integers(weight)
        changed = round_released(integers, wished)
        _write_codes(weight, integers)
        if shifts_zeros and weight.has("zeros"):
            shift = _group_means(wished, integers.groups, weight.scales.shape[1])
            _write(weight.zeros, (whole(weight.zeros) - shift).to(weight.zeros.dtype))
        local(weight.displacement).zero_()
        reduce_over_model_parallel(changed)
        self._record({weight.bits: int(changed)}, 1)

    def _random_state(self) -> list[Tensor]:
        on_cuda = self.layout.device.type == "cuda"
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.layout.device)] if on_cuda else [])]

    def _set_random_state(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        for of_cuda in state[1:]:
            torch.cuda.set_rng_state(of_cuda, self.layout.device)


def _whole_moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """`moments`, of the whole parameter where data parallelism shards it."""
    mean, square = moments(optimizer, parameter)
    if is_sharded(parameter):
        mean, square = (whole(as_shard(part, parameter)) for part in (mean, square))
    return mean, square


def _integers(weight: MovingIntegers) -> Integers:
    """The numbers of this rank's slice, whole where data parallelism shards it."""
    columns, device = weight.shape[1], weight.codes.device
    groups = weight.groups.long() if weight.has("groups") else torch.arange(columns, device=device) // weight.group
    high = whole(weight.high).detach() if weight.bits == 3 else None
    return Integers(weight.bits, whole(weight.codes).detach(), high, whole(weight.scales).detach(), groups)


def _write_codes(weight: MovingIntegers, integers: Integers) -> None:
    """Put whole numbers that were changed where this rank keeps them, if that is not where they were changed."""
    for name in weight.moved:
        if is_sharded(parameter := getattr(weight, name)):
            _write(parameter, getattr(integers, name))


def _write(parameter: Tensor, values: Tensor) -> None:
    local(parameter).copy_(local(shard_like(values, parameter)))


def _factors(weight: MovingIntegers, values: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """[N, R], [R, K] whose product is what `values` of U's shape stand for."""
    return (values, basis.t()) if weight.wish.of_columns else (basis, values)


def _make(proposal: Proposal, by: Tensor) -> None:
    weight = proposal.matrix.weight
    integers = _integers(weight)
    integers.move(proposal.rows, proposal.moves.column, by)
    _write_codes(weight, integers)


def _grant(proposal: Proposal, displaced: Tensor) -> None:
    """Take `displaced` [M] off the displacement of each weight that moved or was refused, by the least change of U."""
    weight, rows, column = proposal.matrix.weight, proposal.rows, proposal.moves.column
    basis, wish = whole(weight.basis), whole(weight.displacement).detach().clone()
    directions = basis[column if weight.wish.of_columns else rows]
    by = directions * (displaced / (weight.unit * directions.square().sum(1).clamp(min=1e-12)))[:, None]
    if weight.wish.of_columns:
        wish.index_add_(0, rows, by, alpha=-1)
    else:
        wish.index_add_(1, column, by.t().contiguous(), alpha=-1)
    _write(weight.displacement, wish)


def _group_means(wished: tuple[Tensor, Tensor], groups: Tensor, count: int) -> Tensor:
    """Means over the columns of each group, [N, G], of the product of two factors."""
    members = torch.zeros(len(groups), count, device=groups.device)
    members[torch.arange(len(groups), device=groups.device), groups] = 1
    return wished[0] @ (wished[1] @ (members / members.sum(0)))
