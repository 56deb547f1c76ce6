"""Rows of documents on disk: any span of any of them, in 16 or 8 bits, believed only once they are safe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from accessory.errors import ConfigError
from accessory.memory.row_file import EightBits, Exact, RowFile, Span

LENGTHS = (5, 1, 0, 7)
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)])


def kinds() -> list[Exact]:
    """Two states of other widths."""
    return [EightBits(128, torch.bfloat16), Exact(6, torch.bfloat16)]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[RowFile]:
    """Open, with all documents but the second written and settled."""
    made = RowFile(tmp_path / "cache", OFFSETS, kinds(), {"base": "a", "data": {"n": 1}})
    made.open()
    for document in (3, 0, 2):
        for state, kind in enumerate(made.states):
            made.write(state, document, kind.pack(rows(document, kind.width)))
    made.add([3, 0, 2])
    yield made
    made.close()


def rows(document: int, width: int) -> torch.Tensor:
    """Of a document, one channel a thousand times the others."""
    generator = torch.Generator().manual_seed(document + width)
    values = torch.randn(LENGTHS[document], width, generator=generator)
    values[:, 3] *= 1000
    return values.bfloat16()


def test_spans_of_several_documents(file: RowFile) -> None:
    """In any order, each from where it is asked for."""
    spans = [Span(3, 2, 4), Span(0, 0, 5), Span(3, 0, 0), Span(3, 6, 1)]
    expected = torch.cat([rows(d, 6)[start : start + length] for d, start, length in spans])
    assert torch.equal(file.read(1, spans), expected)
    eight = torch.cat([file.states[0].unpack(file.states[0].pack(rows(d, 128)))[s : s + n] for d, s, n in spans])
    assert torch.equal(file.read(0, spans), eight)


def test_eight_bits_are_within_half_a_step() -> None:
    """Of a 127th of a block's largest value; and bf16's rounding of scale and result."""
    kind, values = EightBits(128, torch.bfloat16), rows(3, 128)
    found = kind.unpack(kind.pack(values)).float()
    largest = values.float().unflatten(1, (2, 64)).abs().amax(-1).repeat_interleave(64, 1)
    assert ((found - values.float()).abs() <= largest * (0.5 / 127 + 2**-8)).all()
    assert (found - values.float())[:, 64:].abs().max() < 0.05  # not by the channel of another block
    assert torch.equal(
        kind.unpack(kind.pack(torch.zeros(2, 128, dtype=torch.bfloat16))), torch.zeros(2, 128).bfloat16()
    )
    odd = EightBits(6, torch.float32)
    assert odd.pack(rows(0, 6).float()).shape == (5, odd.row_bytes)


def test_written_is_what_is_settled(file: RowFile, tmp_path: Path) -> None:
    """By this process as by another."""
    other = RowFile(tmp_path / "cache", OFFSETS, kinds(), file.identity)
    other.look()
    assert not file.has([3]) and other.missing_bytes == file.total_bytes == 13 * (128 + 4 + 12)
    file.settle()
    assert not file.has([3])
    file.refresh()
    other.look()
    assert file.has([0, 2, 3]) and other.has([0, 2, 3]) and not other.has([0, 1])
    assert other.missing_bytes == 1 * (128 + 4 + 12)


def test_rows_reach_the_disk_before_the_word_that_they_did(file: RowFile, monkeypatch: pytest.MonkeyPatch) -> None:
    order, names = [], {file._rows: "rows", file._marks: "written"}
    for name in ("pwrite", "fdatasync"):
        work = getattr(os, name)
        monkeypatch.setattr(
            os,
            name,
            lambda handle, *rest, name=name, work=work: (order.append((name, names[handle])), work(handle, *rest)),
        )
    file.settle()
    assert [order[0], *dict.fromkeys(order[1:])] == [
        ("fdatasync", "rows"),
        ("pwrite", "written"),
        ("fdatasync", "written"),
    ]


def test_every_difference_is_named(file: RowFile, tmp_path: Path) -> None:
    other = RowFile(tmp_path / "cache", OFFSETS, kinds(), {"base": "b", "data": {"n": 2}})
    with pytest.raises(ConfigError, match=r"base was 'a', is 'b'; data.n was 1, is 2\. Give another directory"):
        other.look()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--cache_base .*file: cannot be written to \(File exists\)"):
        RowFile(tmp_path / "file", OFFSETS, kinds(), {}).open()
