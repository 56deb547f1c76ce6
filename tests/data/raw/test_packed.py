"""Files of tokens: what is written is read, damaged files are refused, and each row of a pass is drawn once."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from accessory.data.raw.documents import Piece, TextReader
from accessory.data.raw.encoding import PART, encoded_parts, parts_of
from accessory.data.raw.files import RawFile
from accessory.data.raw.order import Shape
from accessory.data.raw.packed_file import PackedFile, PackedWriter
from accessory.data.raw.packed_order import PackedOrder, shuffled
from accessory.data.raw.packing import encoded
from accessory.errors import DataError
from tests.data.raw.texts import made, written


def packed(path: Path, documents: list[list[int]], tokenizer) -> RawFile:
    with PackedWriter(path, tokenizer) as writer:
        for document in documents:
            writer.write(np.array(document), 1)
    return RawFile(path, "packed", path.stat().st_size)


@pytest.mark.parametrize("count", [1, 2, 3, 17, 64, 1000])
def test_a_permutation_hits_each_number_once(count: int) -> None:
    orders = [[shuffled(index, count, key) for index in range(count)] for key in range(3)]
    assert all(sorted(order) == [*range(count)] for order in orders)
    if count > 10:
        assert len(set(map(tuple, orders))) == 3
        moved = np.abs(np.array(orders[0]) - np.arange(count)).mean()
        assert moved == pytest.approx(count / 3, rel=0.4)  # as of a random permutation


def test_tokens_come_back(tmp_path: Path, tokenizer) -> None:
    documents = [[1, 5, 6, 2], [1, 2], [1, *range(3, 250), 2]]
    file = packed(tmp_path / "a.safetensors", documents, tokenizer)
    held = PackedFile.open(file, tokenizer)
    assert held.tokens.dtype == np.uint16 and held.documents == 3
    flat = [token for document in documents for token in document]
    assert held.tokens.tolist() == flat == load_file(file.path)["tokens"].tolist()
    tokens, starts = held.row(2, 8, 260)
    assert tokens.tolist() == flat[2:10] and np.flatnonzero(starts).tolist() == [2, 4]
    with pytest.raises(DataError, match=r"a\.safetensors: token 8 is 3; expected 0 to 2"):
        held.row(4, 5, 3)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path, tokenizer, other_tokenizer) -> None:
    file = packed(tmp_path / "a.safetensors", [[1, 5, 2]], tokenizer)
    with pytest.raises(DataError, match="those of another tokenizer than --tokenizer_path gives"):
        other_tokenizer.source = "other"
        PackedFile.open(file, other_tokenizer)
    whole = file.path.read_bytes()
    for damaged in (
        whole[:-2],
        b"",
        b"\xff" * 99,
        (1 << 60).to_bytes(8, "little") + whole[8:],
        whole[:8] + b"[" * 4096,
    ):
        file.path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.safetensors: (found|has)"):
            PackedFile.open(RawFile(file.path, "packed", len(damaged)))
    with pytest.raises(KeyError), PackedWriter(tmp_path / "b.safetensors", tokenizer):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_pass_draws_every_row_once_on_any_ranks(tmp_path: Path, tokenizer) -> None:
    files = [PackedFile.open(packed(tmp_path / f"{n}.safetensors", [[1, *range(3, 3 + 50 * n + 40), 2]], tokenizer))
             for n in range(1, 4)]  # fmt: skip
    order = PackedOrder(files, Shape(8, 4, 1), lambda values: values, seed=3, vocabulary=260)
    expected = Counter((n, at) for n, file in enumerate(files) for at in range(0, (len(file.tokens) - 1) // 8 * 8, 8))
    rows = [row for step in range(order.steps_per_epoch * 3 + 5) for row in order.rows(step)]
    origins = [(next(n for n, f in enumerate(files) if f.file is row.origin[0]), row.origin[1]) for row in rows]
    for done in range(3):
        assert Counter(origins[done * len(expected) : (done + 1) * len(expected)]) == expected
    assert origins[: len(expected)] != origins[len(expected) : 2 * len(expected)] != sorted(origins[: len(expected)])
    for rank in range(2):
        part = PackedOrder(files, Shape(8, 2, 1, rank, 2), lambda values: values, seed=3, vocabulary=260)
        assert [row.origin for row in part.rows(2)] == [row.origin for row in order.rows(2)][rank::2]
    (batch,) = order.micro_batches(0, 1)
    assert batch.tokens[:8].tolist() == order.rows(1)[0].tokens[:-1].tolist()
    with pytest.raises(DataError, match=r"no file has the 5001 tokens of a row \(--max_words\)"):
        PackedOrder(files, Shape(5000, 4, 1), lambda values: values, seed=3, vocabulary=260)


def test_text_is_encoded_as_streams_do(tmp_path: Path, tokenizer) -> None:
    documents = made(20)
    file = written(tmp_path / "a.jsonl", [*documents, ""])
    whole = encoded(TextReader(), tokenizer, file, 0, file.size)
    expected = [token for text in documents for token in [1, *tokenizer.encode(text), 2]]
    assert whole.tokens.tolist() == expected and whole.documents == 20
    assert json.loads(file.path.read_text().splitlines()[-1])["content"] == ""


def test_long_texts_are_encoded_part_by_part(tmp_path: Path, tokenizer) -> None:
    for text in ("\n".join(made(900)), "wort " * 20_000, "水" * 120_000, "short"):
        parts = [*parts_of(text)]
        assert "".join(parts) == text and max(map(len, parts)) <= 2 * PART
        assert len(parts) == 1 or (len(parts) > 3 and min(map(len, parts[:-1])) >= PART)
        assert "水" in text or all(part[-1] == "\n" or following[0] == " " for part, following in pairwise(parts))
        piece = Piece(text, 0, 1)
        whole = np.concatenate([*encoded_parts(piece, tokenizer)])
        assert whole.tolist() == [1, *tokenizer.encode(text), 2]
        midst = np.concatenate([*encoded_parts(piece._replace(begins=False, ends=False), tokenizer)])
        assert midst.tolist() == tokenizer.encode(text, continuation=True)
