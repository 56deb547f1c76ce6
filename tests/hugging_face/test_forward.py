"""Padded batches in, loss and logits out; what cannot be says what was found."""

from __future__ import annotations

import pytest
import torch

from accessory.errors import ConfigError, DataError
from tests.conftest import VOCABULARY
from tests.hugging_face.loaded_models import TOKENS, batch, moved


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(made, side: str) -> None:
    """Rows of different lengths give the logits and loss that each gives alone; padding gives zeros."""
    model = moved(made()[0])
    rows = [TOKENS[:12], TOKENS[5:8], TOKENS[20:21]]
    ids, mask, labels = batch([(row, row) for row in rows], side)
    out = model(ids, mask, labels)
    alone = [model(row[None], labels=row[None]) for row in rows[:2]]
    for row, expected in enumerate(alone):
        torch.testing.assert_close(out.logits[row][mask[row] == 1], expected.logits[0], rtol=1e-5, atol=1e-5)
    assert not out.logits[mask == 0].any()
    assert out.loss.item() == pytest.approx(sum(alone[i].loss.item() * n for i, n in ((0, 11), (1, 2))) / 13, rel=1e-5)
    assert out[0] is out.loss is out["loss"] and out[1:] == (out.logits,)
    assert model(ids, mask)[0].shape == (3, 12, VOCABULARY)


def test_logits_have_a_gradient(made) -> None:
    """For a loss of one's own: that of transformers from the logits is ours, and so are its gradients."""
    model, found = moved(made()[0]), []
    for own in (True, False):
        out = model(TOKENS[None], labels=TOKENS[None])
        loss = torch.nn.functional.cross_entropy(out.logits[0, :-1], TOKENS[1:]) if own else out.loss
        model.zero_grad()
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_batches_and_casts_that_cannot_be(made) -> None:
    """Each says what was found."""
    model, ids = made()[0], TOKENS[None, :4]
    with pytest.raises(DataError, match="row 0 has padding between its tokens"):
        model(ids, torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(DataError, match=r"attention_mask has shape \(1, 3\); expected \(1, 4\)"):
        model(ids, torch.ones(1, 3))
    with pytest.raises(DataError, match="all of it is padding"):
        model(ids, torch.zeros(1, 4))
    with pytest.raises(DataError, match=f"input_ids holds 512; expected 0 to {VOCABULARY - 1}"):
        model(torch.tensor([[3, 512]]))
    with pytest.raises(DataError, match="labels holds 600"):
        model(ids, labels=torch.full((1, 4), 600))
    with pytest.raises(ConfigError, match=r"cannot be cast to torch\.bfloat16"):
        model.to(torch.bfloat16)
    assert model.to("cpu") is model
