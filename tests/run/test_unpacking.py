"""Whether matrices are unpacked ahead: what is asked before it is measured, and what is made of the measurement."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.quant import storage, workspace
from accessory.quant.ahead import Ahead
from accessory.run import unpacking
from accessory.run.unpacking import chosen_ahead, verdict


def decoder_of(quant: str | None = "nf4", device: str = "cuda") -> Decoder:
    """On no device, and said to be on `device`."""
    how = {"dtype": torch.bfloat16, "storage": storage(quant) if quant else None}
    made = Decoder(ModelArgs(dim=64, n_layers=1, n_heads=2, hidden_dim=128, vocab_size=20), **how)
    del made._buffers["frequencies"]
    made.__dict__["frequencies"] = SimpleNamespace(device=torch.device(device))
    return made


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What measuring finds, one after the other."""
    found = [8.0, 6.5]
    monkeypatch.setattr(unpacking, "_time", lambda work: found.pop(0))
    monkeypatch.setattr(unpacking, "CudaLanes", lambda device: SimpleNamespace(device=device))
    return found


@pytest.mark.parametrize(
    ("quant", "device"), [("nf4", "cpu"), (None, "cuda"), ("nf4_scales", "cuda"), ("int4_g64", "cpu")]
)
def test_where_nothing_is_measured(times: list[float], quant: str | None, device: str) -> None:
    """On a CPU, of plain matrices, and of those that steps change."""
    assert chosen_ahead(decoder_of(quant, device), 512) == (None, [])
    assert len(times) == 2


def test_what_is_faster_is_chosen(times: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """And told, with the memory of the second buffer. That which measuring left is freed: the plan counts two."""
    decoder, cpu = decoder_of(), torch.device("cpu")
    monkeypatch.setattr(workspace, "_pieces", {})
    for device in (torch.device("cuda"), cpu):
        workspace._pieces[device, torch.bfloat16] = workspace._Piece(torch.empty(1))
    ahead, (line,) = chosen_ahead(decoder, 512)
    assert isinstance(ahead, Ahead) and times == []
    assert line == (
        "a block's products take 6.50 ms with the next matrix unpacked beside them, 8.00 ms without: it is, in the "
        "plan's second buffer of 0.00 GB"
    )
    assert list(workspace._pieces) == [(cpu, torch.bfloat16)]


def test_what_is_not_faster_is_left() -> None:
    """Within noise."""
    ahead, (line,) = verdict(Ahead(SimpleNamespace()), 8.0, 7.9, 1 << 29)
    assert ahead is None
    assert line.endswith("8.00 ms without: it is not, and the plan's second buffer of 0.54 GB is not needed")
