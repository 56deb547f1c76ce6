"""All documents of a run, tokenized once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from accessory.data.batch import IGNORE
from accessory.data.finding import DATA_DIR
from accessory.data.layouts import DocumentReader, Layouts, Trained
from accessory.data.meta_config import DataEntry, load_data_config
from accessory.data.omissions import Omissions, Origin
from accessory.data.pictures import CROPPED, PicturePlace
from accessory.data.reading import identity_of
from accessory.data.records import some
from accessory.data.shapes import known_shapes
from accessory.data.templates import CHAT, DIALOG, Segment
from accessory.errors import DataError
from accessory.tokenizer import Tokenizer

_CHUNK, _CHARACTERS = 4096, 1 << 21  # most documents tokenized at a time, and characters of them
_FORMAT = 8  # part of the cache's key: raise it when a change makes other documents of the same records
_DIGITS = 32  # kept of a digest
# Fields of Omissions and Layouts kept in the cache.
_CACHED = (
    "notes", "skipped", "unused", "documents", "truncated", "cut_answers", "cut_sources", "cut_targets", "longest",
    "longest_source", "longest_target",
)  # fmt: skip
_TOLD = ("shapes", "layouts", "earlier", "system")
_CHAT_TEMPLATE = "chat_template"  # digest of the template by which documents were laid out, or null


class Corpus:
    """Documents as flat arrays: `tokens` int32 [N], `learned` bool [N], `offsets` int64 [documents + 1].

    `learned` marks supervised tokens. `origins` int32 [documents, 3] has each one's `Origin`. `lengths` and
    `supervised` [documents] are the numbers of tokens and of supervised labels. `told` has the shape and layout of
    each entry's records. `identity` is all that determines the documents.
    """

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        omissions: Omissions,
        identity: dict[str, Any],
        tokenizer: Tokenizer,
        told: Layouts | None = None,
    ) -> None:
        self.tokens, self.learned, self.offsets = arrays["tokens"], arrays["learned"], arrays["offsets"]
        self.origins, self.told = arrays["origins"], told or Layouts()
        self.identity, self.omissions, self.tokenizer = identity, omissions, tokenizer
        self.lengths = np.diff(self.offsets)
        # A document's first token is never a label: no token stands before it.
        running = np.concatenate(([0], np.cumsum(self.learned, dtype=np.int64)))
        self.supervised = running[self.offsets[1:]] - running[self.offsets[:-1]] - self.learned[self.offsets[:-1]]

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [S], labels [S]) of one document; labels are the next tokens, `IGNORE` where not learned."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        tokens, learned = self.tokens[span], self.learned[span]
        labels = np.full(len(tokens), IGNORE, dtype=np.int64)
        labels[:-1] = np.where(learned[1:], tokens[1:], IGNORE)
        return tokens, labels

    def where(self, index: int) -> str:
        """A document as a message names it: its number, file and line."""
        return f"{index} ({self.omissions.where(tuple(self.origins[index].tolist()))})"

    @property
    def fingerprint(self) -> str:
        """Digest of `identity`, in hexadecimal digits."""
        return _fingerprint(self.identity)

    def documents_by_prompt_layout(self) -> dict[str, int]:
        """How many documents each layout has, the one with most first."""
        counts = Counter(self.told.layouts[entry] for entry in self.origins[:, 0].tolist())
        return dict(counts.most_common())

    def check_lengths(self, positions: int | None, made_for: int | None) -> list[str]:
        """A line for the log if some documents are too long for the model, else none.

        positions: most tokens that the model can compute; made_for: most tokens that its settings state. None: without
        such a bound, or unknown. Raises `DataError` for a document with more tokens than `positions`.
        """
        longest = int(self.lengths.argmax())
        for bound in (positions, made_for):
            if bound is None or self.lengths[longest] <= bound:
                continue
            found = (
                f"{int((self.lengths > bound).sum()):,} of {len(self):,} documents have more than {bound:,} tokens; "
                f"document {self.where(longest)} has {self.lengths[longest]:,}"
            )
            if bound == positions:
                raise DataError(f"{found}. The model has no positions beyond; cut them with --max_words {bound}.")
            return [f"{found}. By its settings the model was made for no more; --max_words {bound} cuts them"]
        return []

    def without(self, tokens: Sequence[str]) -> list[str]:
        """Those of `tokens`, added ones of the tokenizer, that no document holds."""
        added = self.tokenizer.added_tokens()
        held = {added[index].content for index in np.unique(self.tokens[np.isin(self.tokens, [*added])]).tolist()}
        return [token for token in tokens if token not in held]

    @property
    def report(self) -> str:
        """What is used, cut and skipped, a line each."""
        lines = [
            f"{len(self):,} documents, {int(self.lengths.sum()):,} tokens, {int(self.supervised.sum()):,} supervised"
        ]
        return "\n".join(lines + self.omissions.lines())

    def show(self, index: int) -> str:
        """One document decoded, what is learned between angle quotes."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        tokens, learned = self.tokens[span].tolist(), self.learned[span]
        edges = [*(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(tokens)]
        own_end = {self.tokenizer.eos_id}
        # An answer laid out by a chat template ends with a control token of it.
        ends = own_end | self.tokenizer.control_tokens().keys()
        parts, begin, before = [], 0, ""
        for end in edges:
            # Decoded from the start each time: on its own, a piece would lose a space that it opens with.
            text = self.tokenizer.decode(tokens[:end])
            part = text[len(before) :] + ("<end>" if tokens[end - 1] in (ends if learned[begin] else own_end) else "")
            parts.append(f"«{part}»" if learned[begin] else part)
            begin, before = end, text
        return "".join(parts)


@dataclass(frozen=True)
class Cuts:
    """Where documents are cut, in tokens: as a whole, before the first token that is learned, and from it on."""

    max_words: int
    source_max_len: int | None = None
    target_max_len: int | None = None


def build_corpus(
    data_config: Path | Sequence[Path],
    tokenizer: Tokenizer,
    *,
    max_words: int,
    source_max_len: int | None = None,
    target_max_len: int | None = None,
    data_dir: Path = DATA_DIR,
    dialog: bool = False,
    mask_history: bool = False,
    train_on_source: bool = False,
    threads: int = 1,
    cache_dir: Path | None = None,
    max_skipped: float = 1.0,
    clock: datetime | None = None,
    trained: Trained | None = None,
    pictures: PicturePlace | None = None,
    image_transform: str = CROPPED,
) -> Corpus:
    """Read, template and tokenize everything `data_config` names, documents cut at `max_words` tokens.

    Names of data sets, and paths that are found nowhere else, are looked for in `data_dir`.
    source_max_len, target_max_len: cut what stands before the first learned token, and the rest, each by itself first.
    mask_history: learn only the last answer of a conversation. train_on_source: learn questions, too.
    Chat templates that print the time print `clock` (absent: now), which is then part of the fingerprint.
    trained: what a model was trained on that is to be asked; questions are then laid out as in its training.
    pictures: where the model takes the image of a record; None: it sees none, and records with images are skipped.
    With `cache_dir` the result is kept there under its fingerprint and mapped by later calls, from any process.
    Raises `DataError` if a file is broken, not one record can be used, or more than the share `max_skipped` cannot;
    `TokenizerError` if an entry asks for a chat template and the tokenizer has none that can be learned from.
    """
    entries = [
        entry.model_copy(
            update={
                "mask_history": entry.mask_history or mask_history,
                "train_on_source": entry.train_on_source or train_on_source,
            }
        )
        for entry in load_data_config(data_config, data_dir)
    ]
    unused = [
        (number, note)
        for number, entry in enumerate(entries)
        for note in (*entry.source.notes, *_unused_settings(entry, dialog))
    ]
    omissions = Omissions([str(entry.path) for entry in entries], unused)
    reader = DocumentReader(entries, tokenizer, omissions, dialog=dialog, clock=clock, trained=trained)
    asked = any(entry.prompt_type == CHAT for entry in entries)
    cuts = Cuts(max_words, source_max_len, target_max_len)
    identity = _identity(entries, tokenizer, cuts, dialog, _digest(reader) if asked else None)
    identity |= {"trained": asdict(trained)} if trained else {}
    cached = cache_dir / f"{_fingerprint(identity)}.safetensors" if cache_dir else None
    arrays = _from_cache(cached, omissions, reader) if cached else None
    if made := arrays is None:
        arrays = _tokenize(reader.documents(), entries, tokenizer, cuts, threads, omissions)
        if len(arrays["offsets"]) == 1:
            found = f"{some(omissions.files)}: not one record can be trained on; known shapes: {known_shapes()}."
            raise DataError("\n".join([found, *omissions.lines()]))
    omissions.check(arrays["origins"], max_skipped)
    if cached and made:
        _to_cache(cached, arrays, omissions, reader)
    return Corpus(arrays, omissions, _completed(identity, reader), tokenizer, reader.told)


def _digest(reader: DocumentReader) -> str:
    """Of the chat template that is at work."""
    return hashlib.sha256(reader.chat.definition.encode()).hexdigest()[:_DIGITS]


def _unused_settings(entry: DataEntry, dialog: bool) -> list[str]:
    """A sentence for each setting of an entry that has no effect."""
    notes = ["root is not used: there is no vision part yet"] * bool(entry.root)
    notes += ["preprocess is not used with --dialog"] * bool(dialog and entry.preprocess)
    if dialog and entry.prompt_type not in (CHAT, DIALOG) and "prompt_type" in entry.model_fields_set:
        notes.append(f"prompt_type {entry.prompt_type} is not used: --dialog lays conversations out its own way")
    return notes


def _chunks(documents: Iterator[tuple[Origin, list[Segment]]]) -> Iterator[list[tuple[Origin, list[Segment]]]]:
    """The documents in lists that are tokenized together."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += sum(len(segment.text) + len(segment.ids or ()) for segment in document[1])
        if len(chunk) == _CHUNK or size >= _CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _tokenize(
    documents: Iterator[tuple[Origin, list[Segment]]],
    entries: list[DataEntry],
    tokenizer: Tokenizer,
    cuts: Cuts,
    threads: int,
    omissions: Omissions,
) -> dict[str, np.ndarray]:
    """The arrays of a `Corpus`; a chunk of its texts is in memory at a time."""
    tokens, learned, lengths, origins = [], [], [0], []
    for chunk in _chunks(documents):
        texts = [segments for _, segments in chunk if segments[0].ids is None]
        first = iter(tokenizer.encode_batch([segments[0].text for segments in texts], threads=threads))
        later_texts = [segment.text for segments in texts for segment in segments[1:]]
        later = iter(tokenizer.encode_batch(later_texts, continuation=True, threads=threads))
        for origin, segments in chunk:
            supervised = [segment.supervised for segment in segments]
            if segments[0].ids is None:  # else a chat template has made the tokens, start and end included
                pieces = [tokenizer.start_ids, next(first), *(next(later) for _ in segments[1:]), [tokenizer.eos_id]]
                supervised = [False, *supervised, supervised[-1]]
            else:
                pieces = [segment.ids for segment in segments]
            ids = np.array([token for piece in pieces for token in piece], dtype=np.int32)
            flags = np.repeat(supervised, [len(piece) for piece in pieces])
            ids, flags = _cut(ids, flags, cuts, omissions)
            if not flags[1:].any():
                omissions.skip(f"its prompt fills all {cuts.max_words} tokens of --max_words", origin)
                continue
            if entries[origin[0]].train_on_source:
                flags[1:] = True
            tokens.append(ids)
            learned.append(flags)
            lengths.append(len(ids))
            origins.append(origin)
    empty = [np.zeros(0, np.int32)]
    return {
        "tokens": np.concatenate(tokens or empty),
        "learned": np.concatenate(learned or empty).astype(bool),
        "offsets": np.cumsum(lengths, dtype=np.int64),
        "origins": np.array(origins, dtype=np.int32).reshape(-1, 3),
    }


def _cut(ids: np.ndarray, flags: np.ndarray, cuts: Cuts, omissions: Omissions) -> tuple[np.ndarray, np.ndarray]:
    """A document's tokens and what is learned of them, both cut; what is cut of a used document is counted."""
    source = int(flags.argmax())
    target = len(ids) - source
    most_source, most_target = cuts.source_max_len or source, cuts.target_max_len or target
    if source > most_source or target > most_target:
        keep = np.ones(len(ids), bool)
        keep[most_source:source] = keep[source + most_target :] = False
        ids, flags = ids[keep], flags[keep]
    if flags[1 : cuts.max_words].any():
        omissions.documents += 1
        omissions.cut_sources += source > most_source
        omissions.cut_targets += target > most_target
        omissions.truncated += len(ids) > cuts.max_words
        omissions.cut_answers += bool(flags[cuts.max_words :].any())
        omissions.longest = max(omissions.longest, len(ids))
        omissions.longest_source = max(omissions.longest_source, source)
        omissions.longest_target = max(omissions.longest_target, target)
    return ids[: cuts.max_words], flags[: cuts.max_words]


def _identity(
    entries: list[DataEntry], tokenizer: Tokenizer, cuts: Cuts, dialog: bool, chat_template: str | None
) -> dict[str, Any]:
    """All that determines the documents, as JSON: settings by their names, contents of files by digests.

    What earlier versions did not have is left out where it is not used, so that their runs can be resumed.
    """
    lengths = {"source_max_len": cuts.source_max_len, "target_max_len": cuts.target_max_len}
    return {
        "format": _FORMAT,
        "max_words": cuts.max_words,
        **{name: value for name, value in lengths.items() if value is not None},
        "dialog": dialog,
        "tokenizer": tokenizer.fingerprint[:_DIGITS],
        _CHAT_TEMPLATE: chat_template,
        "META": [identity_of(entry) for entry in entries],
    }


def _completed(identity: dict[str, Any], reader: DocumentReader) -> dict[str, Any]:
    """The identity with what was told of the records, except where earlier versions made the same documents."""
    told = reader.told
    shapes = zip(told.shapes, told.layouts, told.earlier, strict=True)
    files = [
        {name: value for name, value in file.items() if name != "shape"}
        | ({} if earlier else {"shape": shape, "layout": layout})
        for file, (shape, layout, earlier) in zip(identity["META"], shapes, strict=True)
    ]
    return identity | {"META": files} | ({_CHAT_TEMPLATE: _digest(reader)} if CHAT in told.layouts else {})


def _fingerprint(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _to_cache(path: Path, arrays: dict[str, np.ndarray], omissions: Omissions, reader: DocumentReader) -> None:
    metadata = {name: json.dumps(getattr(omissions, name)) for name in _CACHED}
    metadata |= {name: json.dumps(getattr(reader.told, name)) for name in _TOLD}
    metadata[_CHAT_TEMPLATE] = json.dumps(_digest(reader) if CHAT in reader.told.layouts else None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, path, metadata=metadata)  # written beside and renamed, so readers see all of it or nothing
        path.chmod(0o644)  # the library lets nobody else read it
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: the tokenized data cannot be kept there ({error}).") from error


def _from_cache(path: Path, omissions: Omissions, reader: DocumentReader) -> dict[str, np.ndarray] | None:
    """The arrays kept at `path`; fills `omissions` and what `reader` has told from it.

    None where there are none, or the file is damaged, of an earlier version, or laid out by another chat template.
    """
    try:
        # As torch tensors, since the library maps those and copies NumPy's.
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name).numpy() for name in ("tokens", "learned", "offsets", "origins")}
    except (OSError, SafetensorError):
        return None
    if not metadata.keys() >= {*_CACHED, *_TOLD, _CHAT_TEMPLATE}:
        return None
    laid_out_by = json.loads(metadata[_CHAT_TEMPLATE])
    if laid_out_by and (reader.tokenizer.chat_template is None or _digest(reader) != laid_out_by):
        return None
    for names, kept in ((_CACHED, omissions), (_TOLD, reader.told)):
        for name in names:
            setattr(kept, name, json.loads(metadata[name]))
    return arrays
