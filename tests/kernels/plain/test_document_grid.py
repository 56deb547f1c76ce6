"""Documents laid out side by side, and back."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from accessory.kernels.plain import document_grid
from accessory.kernels.plain.document_grid import BLOCK_SCORES, MULTIPLE, cheapest_blocks, cut_groups, grid_of, padded

CPU = torch.device("cpu")


@pytest.mark.parametrize("lengths", [(3,), (8, 8), (5, 1, 30, 2, 13, 31), (1,) * 40, (700, 9, 700, 650)])
def test_every_token_has_its_cell(lengths: tuple[int, ...]) -> None:
    """Out and back gives the same tensor; a document's tokens stand in order in one row of one group."""
    grid, tokens = grid_of(lengths, 4, 2, CPU), sum(lengths)
    packed = torch.arange(tokens * 4 * 2.0).view(tokens, 4, 2)
    laid_out = [group.lay_out(packed, pad_with_zeros=True) for group in grid.groups]
    whole, parts = grid.empty(packed)
    for part, content in zip(parts, laid_out, strict=True):
        part.copy_(content)
    assert torch.equal(grid.pack(whole, 4), packed)
    found = []
    for group, part in zip(grid.groups, laid_out, strict=True):
        assert part.shape == (group.count * 2, 2, group.longest, 2)
        rows = part.unflatten(0, (group.count, 2)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # [count, longest, 4, 2]
        found += [row[row.flatten(1).any(1) | (torch.arange(group.longest) == 0)] for row in rows]
    wanted = packed.split(lengths)
    assert sorted(map(len, found)) == sorted(lengths)
    assert all(any(torch.equal(row, document) for row in found if len(row) == len(document)) for document in wanted)


def test_heads_that_share_keys_stand_together() -> None:
    """Query head h reads key/value head h // R."""
    packed = torch.arange(6.0).view(1, 6, 1).expand(8, 6, 1)
    (group,) = grid_of((8,), 6, 2, CPU).groups
    assert group.lay_out(packed)[:, :, 0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_padding_is_zero_where_that_is_asked() -> None:
    (group,) = grid_of((5,), 1, 1, CPU).groups
    assert group.longest == MULTIPLE
    assert group.places[1].padding.tolist() == [5, 6, 7]
    packed = torch.full((5, 1, 1), torch.nan)
    packed[:] = 1
    assert group.lay_out(packed, pad_with_zeros=True).flatten().tolist() == [1] * 5 + [0] * 3
    assert group.lay_out(packed).isfinite().all()


@pytest.mark.parametrize("lengths", [[90, 80, 80, 24, 17, 16, 3], [300, 299, 40], [64] * 7, [72, 64, 64, 64]])
@pytest.mark.parametrize("heads", [2, 9, 24, 64])
def test_cuts_are_the_cheapest(lengths: list[int], heads: int) -> None:
    """Of all ways to cut."""

    def cost(cuts: list[tuple[int, int]]) -> float:
        total = 0.0
        for begin, end in cuts:
            length, blocks = padded(lengths[begin]), cheapest_blocks(padded(lengths[begin]))
            at_once = (end - begin) * heads * length * length / blocks
            total += at_once * sum(i / blocks for i in range(1, blocks + 1)) + blocks * document_grid._CALL_SCORES
            if at_once > BLOCK_SCORES and end - begin > 1:
                return math.inf
        return total

    inner = range(1, len(lengths))
    ways = [
        list(itertools.pairwise((0, *places, len(lengths))))
        for count in range(len(lengths))
        for places in itertools.combinations(inner, count)
    ]
    assert cost(cut_groups(lengths, heads)) == pytest.approx(min(map(cost, ways)))


@pytest.mark.parametrize(
    ("length", "rows"), [(3000, 64), (1024, 64), (400, 67), (200, 100), (104, 52), (64, 64), (8, 8)]
)
def test_documents_attend_in_blocks_of_one_size(length: int, rows: int) -> None:
    """That together are the document, none above the limit unless it would be too short; short ones are one block."""
    (group,) = grid_of((length,), 9, 9, CPU).groups
    assert document_grid.rows_at_once(group.count, group.longest, 9, group.skipped) == rows
    assert rows * 9 * length <= BLOCK_SCORES or rows == document_grid.FEWEST_ROWS
    assert -(-length // rows) * rows - length < max(rows // 2, 8)
