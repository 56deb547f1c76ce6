"""Rows with padding on either side to packed tokens, and back, against the rows as lists."""

from __future__ import annotations

import pytest
import torch

from accessory.data.batch import IGNORE
from accessory.errors import DataError
from accessory.hugging_face.padding import PaddedRows

ROWS = [[11, 12, 13, 14], [21], [], [31, 32]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_there_and_back(side: str) -> None:
    """Tokens, what is computed of them, and labels, each of which is the next token's of its own row."""

    def padded(row: list[int], with_: int) -> list[int]:
        rest = [with_] * (4 - len(row))
        return rest + row if side == "left" else row + rest

    ids = torch.tensor([padded(row, 0) for row in ROWS])
    rows = PaddedRows.of(ids, torch.tensor([padded([1] * len(row), 0) for row in ROWS]))
    assert rows.lengths == (4, 1, 2)
    assert rows.packed(ids).tolist() == [token for row in ROWS for token in row]
    values = torch.arange(14, dtype=torch.float64).view(7, 2).requires_grad_()
    back = rows.padded(values)
    assert back.shape == (4, 4, 2) and torch.equal(rows.packed(back), values) and not back[~rows.mask].any()
    (gradient,) = torch.autograd.grad((back * 3).sum(), values)
    assert (gradient == 3).all()
    wanted = [label for row in ROWS for label in ([*row[1:], IGNORE] if row else [])]
    assert rows.next_labels(torch.where(rows.mask, ids, 77)).tolist() == wanted


def test_without_a_mask_all_are_tokens() -> None:
    rows = PaddedRows.of(torch.arange(6).view(2, 3), None)
    assert rows.lengths == (3, 3)
    assert rows.padded(torch.arange(12).view(6, 2)).tolist() == torch.arange(12).view(2, 3, 2).tolist()


@pytest.mark.parametrize(
    ("ids", "mask", "said"),
    [
        (torch.ones(3), None, r"input_ids has shape \(3,\); expected \[rows, tokens\]"),
        (torch.ones(1, 4), torch.ones(1, 3), r"attention_mask has shape \(1, 3\); expected \(1, 4\)"),
        (torch.ones(2, 3), torch.tensor([[1, 1, 1], [1, 0, 1]]), "row 1 has padding between its tokens"),
        (torch.ones(1, 4), torch.zeros(1, 4), "all of it is padding"),
    ],
)
def test_what_cannot_be(ids: torch.Tensor, mask: torch.Tensor | None, said: str) -> None:
    with pytest.raises(DataError, match=said):
        PaddedRows.of(ids, mask)
    with pytest.raises(DataError, match=r"labels has shape \(1, 2\); expected \(1, 3\)"):
        PaddedRows.of(torch.ones(1, 3), None).next_labels(torch.ones(1, 2))
