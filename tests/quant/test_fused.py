"""The copy of a 4-bit matrix that few rows are multiplied with."""

from __future__ import annotations

import pytest
import torch

from accessory.quant import native, storage
from accessory.quant.fused import MOST_ROWS, FusedCopy

pytestmark = pytest.mark.skipif(not native.FUSES, reason="this processor has no bf16 products of bitsandbytes'")


def copy_of(rows: int, columns: int, quant_type: str = "nf4") -> tuple[FusedCopy | None, torch.Tensor]:
    """A copy of a random matrix, and what it stands for, in float64."""
    weight = storage(f"{quant_type}_single")((rows, columns))
    weight.pack(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)))
    made = FusedCopy.of(weight.codes, weight.scales, (rows, columns), 64, quant_type)
    return made, weight.unpack(torch.float64)


def test_one_column_at_a_time() -> None:
    """Each column of the identity picks a column of W, to the rounding of code and scale to bf16."""
    made, matrix = copy_of(64, 128)
    found = made.multiply(torch.eye(128)[:MOST_ROWS].bfloat16()).double()
    torch.testing.assert_close(found, matrix.t()[:MOST_ROWS], rtol=3 * 2**-8, atol=1e-6)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_as_near_as_a_plain_bf16_product(quant_type: str) -> None:
    """Root mean square, against float64: at most a quarter more than weights rounded to bf16 give."""
    made, matrix = copy_of(256, 512, quant_type)
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = x.double() @ matrix.t()
    error = (made.multiply(x).double() - wanted).norm()
    plain = (torch.nn.functional.linear(x, matrix.bfloat16()).double() - wanted).norm()
    assert error < 1.25 * plain


def test_a_row_comes_out_the_same_among_others() -> None:
    """So that a batch gets what each of its prompts gets alone."""
    made, _ = copy_of(64, 128)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    together = made.multiply(x)
    assert all(torch.equal(made.multiply(x[i : i + 1])[0], together[i]) for i in range(5))


def test_joined() -> None:
    """Two matrices one under the other give what each gives."""
    (one, _), (other, _) = copy_of(64, 128), copy_of(32, 128)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = FusedCopy.joined([one, other]).multiply(x)
    assert torch.equal(found, torch.cat([one.multiply(x), other.multiply(x)], 1))


def test_only_what_the_product_can_do() -> None:
    """Odd sizes have no copy; other dtypes and many rows are not taken."""
    assert copy_of(48, 128)[0] is None
    made, _ = copy_of(64, 128)
    assert made.takes(torch.empty(MOST_ROWS, 128, dtype=torch.bfloat16))
    assert not made.takes(torch.empty(MOST_ROWS + 1, 128, dtype=torch.bfloat16))
    assert not made.takes(torch.empty(1, 128))
