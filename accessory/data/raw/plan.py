"""Where the blocks of raw text lie, and about how many tokens they make: known before any of it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from accessory.data.raw.documents import TextReader
from accessory.data.raw.encoding import PART, parts_of
from accessory.data.raw.files import RawFile, identity_of
from accessory.data.raw.skipped import place_of
from accessory.errors import DataError
from accessory.tokenizer import Tokenizer

_SMALLEST, _LARGEST = 1 << 12, 1 << 18  # bytes of a block of text; of a Parquet file it has the larger or more
_BLOCKS_A_STREAM = 4  # at the least, where files are large enough
_SAMPLED = 64  # blocks from whose first documents the number of tokens is estimated
_KEPT = 2  # passes whose permutation is kept


class Block(NamedTuple):
    """A part of a file that begins and ends between documents, in bytes or rows."""

    file: RawFile
    start: int
    stop: int


@dataclass(frozen=True)
class TextPlan:
    """The blocks of all files, int64 [blocks, 3]: number of the file, start, stop. tokens: in all, about."""

    files: tuple[RawFile, ...]
    reader: TextReader
    blocks: np.ndarray
    tokens: int
    seed: int
    identity: dict[str, Any]

    def block(self, number: int) -> Block:
        """Block `number` of an endless sequence: pass after pass over all blocks, each pass in an order of its own."""
        done, place = divmod(number, len(self.blocks))
        file, start, stop = self.blocks[_permutation(self.seed, done, len(self.blocks))[place]].tolist()
        return Block(self.files[file], start, stop)


@lru_cache(maxsize=_KEPT)
def _permutation(seed: int, done: int, count: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence([seed, done])).permutation(count)


def plan_text(files: Sequence[RawFile], reader: TextReader, tokenizer: Tokenizer, streams: int, seed: int) -> TextPlan:
    """Cut `files` into enough blocks for so many `streams`, and estimate the tokens.

    Raises `DataError` where a file cannot be read, or there is no text in any.
    """
    total = sum(file.size for file in files)
    size = max(total // (_BLOCKS_A_STREAM * streams), _SMALLEST)
    sizes = {"parquet": max(size, _LARGEST)}
    cuts = (reader.cut(file, sizes.get(file.kind, min(size, _LARGEST))) for file in files)
    blocks = np.concatenate([_spans(number, cut) for number, cut in enumerate(cuts)])
    if not len(blocks):
        raise DataError(f"{', '.join(str(file.path) for file in files[:3])}: there is no text to train on.")
    identity = {**identity_of(files), "text_key": reader.key, "txt": reader.unit}
    tokens = _estimated(files, reader, tokenizer, blocks)
    if not tokens:
        raise DataError(f"{', '.join(str(file.path) for file in files[:3])}: {_without_text(files, reader, blocks)}")
    return TextPlan(tuple(files), reader, blocks, tokens, seed, identity)


def _spans(number: int, cut: list[int]) -> np.ndarray:
    """The blocks of file `number`, int64 [blocks, 3]: arrays take a tenth of what lists of so many do."""
    places = np.array(cut, dtype=np.int64)
    return np.stack([np.full_like(places[1:], number), places[:-1], places[1:]], axis=1)


def _estimated(files: Sequence[RawFile], reader: TextReader, tokenizer: Tokenizer, blocks: np.ndarray) -> int:
    """About how many tokens all blocks make: those of documents here and there, by the bytes or rows they take."""
    chosen = blocks[np.unique(np.linspace(0, len(blocks) - 1, _SAMPLED).astype(int))]
    read, tokens = dict.fromkeys(("text", "rows"), 0), dict.fromkeys(("text", "rows"), 0)
    rows, lengths = np.array([_measure(file) == "rows" for file in files])[blocks[:, 0]], blocks[:, 2] - blocks[:, 1]
    total = {"text": int(lengths[~rows].sum()), "rows": int(lengths[rows].sum())}
    for number, start, stop in chosen.tolist():
        measure = _measure(files[number])
        after, seen = stop, 0
        for piece in reader.read(files[number], start, stop):
            if text := piece.text:
                part = next(parts_of(text))
                tokens[measure] += len(tokenizer.encode(part)) * len(text) / len(part)
                tokens[measure] += len(tokenizer.start_ids) * piece.begins + piece.ends
                after, seen = piece.after, seen + len(part)
            if seen >= PART:
                break
        read[measure] += after - start
    return round(sum(tokens[measure] * total[measure] / read[measure] for measure in read if read[measure]))


def _without_text(files: Sequence[RawFile], reader: TextReader, blocks: np.ndarray) -> str:
    """That a sample of the files held no text, and why the first document could not be used, if there is one."""
    number, start, stop = blocks[0].tolist()
    first = next(reader.read(files[number], start, stop), None)
    why = f": {place_of(files[number], first.at)}: {first.fault}" if first and first.fault else ""
    return f"no text was found in a sample of it{why}."


def _measure(file: RawFile) -> str:
    return "rows" if file.kind == "parquet" else "text"
