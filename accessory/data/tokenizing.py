"""From laid out documents to flat arrays of tokens, cut to the lengths that were asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from accessory.data.image_table import NO_IMAGE
from accessory.data.layouts import LaidOut
from accessory.data.meta_config import DataEntry
from accessory.data.omissions import Omissions, Origin
from accessory.data.pictures import PicturePlace
from accessory.tokenizer import Tokenizer

_CHUNK, _CHARACTERS = 4096, 1 << 21  # most documents tokenized at a time, and characters of them
DOCUMENTS = "of_document"
"""In the arrays: the number of the image of each document, int32 [documents]."""


@dataclass(frozen=True)
class Cuts:
    """Where documents are cut, in tokens: as a whole, before the first token that is learned, and from it on."""

    max_words: int
    source_max_len: int | None = None
    target_max_len: int | None = None


def tokenized(
    documents: Iterator[LaidOut],
    entries: list[DataEntry],
    tokenizer: Tokenizer,
    cuts: Cuts,
    threads: int,
    omissions: Omissions,
    pictures: PicturePlace | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of a `Corpus`, and `DOCUMENTS`; a chunk of its texts is in memory at a time.

    pictures: where the model takes the picture of a document, whose rows `cuts` counts.
    """
    chunks = [_flat([], [], [], [])]
    for chunk in _chunks(documents):
        tokens, learned, origins, images = [], [], [], []
        for (origin, _, image), (ids, flags) in zip(chunk, _tokens(chunk, tokenizer, threads), strict=True):
            rows = pictures.rows if pictures and image != NO_IMAGE else 0
            ids, flags = _cut(ids, flags, cuts, omissions, rows)
            if not flags[rows == 0 :].any():
                whose = "picture and prompt fill" if rows else "prompt fills"
                omissions.skip(f"its {whose} all {cuts.max_words} tokens of --max_words", origin)
                continue
            if entries[origin[0]].train_on_source:
                flags[1:] = True
            tokens.append(ids)
            learned.append(flags)
            origins.append(origin)
            images.append(image)
        chunks.append(_flat(tokens, learned, origins, images))
    names = ("tokens", "learned", "offsets", "origins", DOCUMENTS)
    arrays = dict(zip(names, map(np.concatenate, zip(*chunks, strict=True)), strict=True))
    return arrays | {"offsets": np.concatenate(([0], np.cumsum(arrays["offsets"], dtype=np.int64)))}


def _flat(
    tokens: list[np.ndarray], learned: list[np.ndarray], origins: list[Origin], images: list[int]
) -> tuple[np.ndarray, ...]:
    """The tokens, what is learned of them, each document's length, origin and image: an array each."""
    return (
        np.concatenate([np.zeros(0, np.int32), *tokens]),
        np.concatenate([np.zeros(0, bool), *learned]),
        np.array([len(ids) for ids in tokens], dtype=np.int64),
        np.array(origins, dtype=np.int32).reshape(-1, 3),
        np.array(images, dtype=np.int32),
    )


def _chunks(documents: Iterator[LaidOut]) -> Iterator[list[LaidOut]]:
    """The documents in lists that are tokenized together."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += sum(len(segment.text) + len(segment.ids or ()) for segment in document.segments)
        if len(chunk) == _CHUNK or size >= _CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _tokens(chunk: list[LaidOut], tokenizer: Tokenizer, threads: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens int32 [S], what is learned of them bool [S]) of each document."""
    texts = [segments for _, segments, _ in chunk if segments[0].ids is None]
    first = iter(tokenizer.encode_batch([segments[0].text for segments in texts], threads=threads))
    later_texts = [segment.text for segments in texts for segment in segments[1:]]
    later = iter(tokenizer.encode_batch(later_texts, continuation=True, threads=threads))
    for _, segments, _ in chunk:
        supervised = [segment.supervised for segment in segments]
        if segments[0].ids is None:  # else a chat template has made the tokens, start and end included
            pieces = [tokenizer.start_ids, next(first), *(next(later) for _ in segments[1:]), [tokenizer.eos_id]]
            supervised = [False, *supervised, supervised[-1]]
        else:
            pieces = [segment.ids for segment in segments]
        ids = np.array([token for piece in pieces for token in piece], dtype=np.int32)
        yield ids, np.repeat(supervised, [len(piece) for piece in pieces])


def _cut(
    ids: np.ndarray, flags: np.ndarray, cuts: Cuts, omissions: Omissions, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """A document's tokens and what is learned of them, both cut; what is cut of a used document is counted.

    rows: of its picture, which are never cut, but leave fewer tokens of --max_words.
    """
    source, most = int(flags.argmax()), max(cuts.max_words - rows, 0)
    target = len(ids) - source
    most_source, most_target = cuts.source_max_len or source, cuts.target_max_len or target
    if source > most_source or target > most_target:
        keep = np.ones(len(ids), bool)
        keep[most_source:source] = keep[source + most_target :] = False
        ids, flags = ids[keep], flags[keep]
    if flags[rows == 0 : most].any():
        omissions.documents += 1
        omissions.cut_sources += source > most_source
        omissions.cut_targets += target > most_target
        omissions.truncated += len(ids) > most
        omissions.cut_answers += bool(flags[most:].any())
        omissions.longest = max(omissions.longest, len(ids) + rows)
        omissions.longest_source = max(omissions.longest_source, source)
        omissions.longest_target = max(omissions.longest_target, target)
    return ids[:most], flags[:most]
