"""All documents of a run, tokenized once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from accessory.data.batch import IGNORE, Inset
from accessory.data.finding import DATA_DIR
from accessory.data.image_table import NO_IMAGE, ImageFinder, ImageTable
from accessory.data.layouts import DocumentReader, Layouts, Trained
from accessory.data.meta_config import DataEntry, load_data_config
from accessory.data.omissions import Omissions
from accessory.data.pictures import CROPPED, UNCROPPED, Picture, PicturePlace
from accessory.data.reading import identity_of
from accessory.data.records import some
from accessory.data.shapes import known_shapes
from accessory.data.templates import CHAT, DIALOG
from accessory.data.tokenizing import DOCUMENTS, Cuts, tokenized
from accessory.errors import DataError
from accessory.tokenizer import Tokenizer

_FORMAT = 8  # part of the cache's key: raise it when a change makes other documents of the same records
_DIGITS = 32  # kept of a digest
_PLACEHOLDER = 0  # token in whose place a row of a picture stands
# Fields of Omissions and Layouts kept in the cache.
_CACHED = (
    "notes", "skipped", "examples", "unused", "documents", "truncated", "cut_answers", "cut_sources", "cut_targets",
    "longest", "longest_source", "longest_target",
)  # fmt: skip
_TOLD = ("shapes", "layouts", "earlier", "system")
_CHAT_TEMPLATE = "chat_template"  # digest of the template by which documents were laid out, or null


@dataclass(frozen=True)
class Pictures:
    """The pictures of a corpus: where the model takes one, by which of `TRANSFORMS`, and which files they are."""

    place: PicturePlace
    transform: str
    images: ImageTable


class Corpus:
    """Documents as flat arrays: `tokens` int32 [N], `learned` bool [N], `offsets` int64 [documents + 1].

    `learned` marks supervised tokens. `origins` int32 [documents, 3] has each one's `Origin`. `lengths` and
    `supervised` [documents] are the numbers of tokens and of supervised labels. `told` has the shape and layout of
    each entry's records. `identity` is all that determines the documents. `pictures`: where the model takes any; their
    rows are counted in `lengths`, and are not among `tokens`. `labelable` [documents] is the number of tokens that may
    be labels: not a document's first one, unless it is learned and a picture stands before it, and no row of a picture.
    """

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        omissions: Omissions,
        identity: dict[str, Any],
        tokenizer: Tokenizer,
        told: Layouts | None = None,
        pictures: Pictures | None = None,
    ) -> None:
        self.pictures = pictures
        self.tokens, self.learned, self.offsets = arrays["tokens"], arrays["learned"], arrays["offsets"]
        self.origins, self.told = arrays["origins"], told or Layouts()
        self.identity, self.omissions, self.tokenizer = identity, omissions, tokenizer
        words = np.diff(self.offsets)
        self.lengths = words if pictures is None else words + self._rows() * (pictures.images.of_document != NO_IMAGE)
        # A document's first token is never a label: no token stands before it, unless it has rows of a picture.
        first = self.learned[self.offsets[:-1]]
        predicted = first & (self.lengths > words)
        self.supervised = np.add.reduceat(self.learned, self.offsets[:-1], dtype=np.int64) - (first & ~predicted)
        self.labelable = words - 1 + predicted

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [S], labels [S]) of one document; labels are the next tokens, `IGNORE` where not learned."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        tokens, learned = self.tokens[span], self.learned[span]
        if rows := self.lengths[index] - len(tokens):
            start = self._picture_start(tokens)
            tokens = np.insert(tokens, start, np.full(rows, _PLACEHOLDER))
            learned = np.insert(learned, start, np.zeros(rows, bool))
        labels = np.full(len(tokens), IGNORE, dtype=np.int64)
        labels[:-1] = np.where(learned[1:], tokens[1:], IGNORE)
        return tokens, labels

    def insets(self, index: int, draw: int | None = None) -> tuple[Inset, ...]:
        """A document's picture, if it has one, in place of the placeholders among its tokens.

        draw: what a random crop is drawn from; None: the image is not cropped at random, whatever the transform.
        """
        path = self.pictures and self.pictures.images.path(index)
        if path is None:
            return ()
        place, transform = self.pictures.place, self.pictures.transform
        drawn = transform == CROPPED and draw is not None
        uncropped = UNCROPPED if transform == CROPPED else transform
        picture = Picture(
            path,
            transform if drawn else uncropped,
            place.size,
            draw if drawn else 0,
            where=f"document {self.where(index)}",
        )
        start = self._picture_start(self.tokens[self.offsets[index] : self.offsets[index + 1]]) if place.rows else 0
        return (Inset(start, place.rows, picture),)

    def where(self, index: int) -> str:
        """A document as a message names it: its number, file and line."""
        return f"{index} ({self.omissions.where(tuple(self.origins[index].tolist()))})"

    def image_name(self, index: int) -> str | None:
        """The name of a document's image, as its record has it; None without any."""
        return self.pictures and self.pictures.images.name(index)

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
        if self.pictures:
            numbers = self.pictures.images.of_document
            numbers = numbers[numbers != NO_IMAGE]
            found = f"{len(numbers):,} documents have an image ({len(np.unique(numbers)):,} different, by"
            lines.append(f"{found} {self.pictures.transform}); an image takes {self._rows():,} tokens")
        return "\n".join(lines + self.omissions.lines())

    def show(self, index: int) -> str:
        """One document decoded, what is learned between angle quotes; `<image: name>` stands for its image."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        tokens, learned = self.tokens[span].tolist(), self.learned[span]
        edges = [*(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(tokens)]
        own_end = {self.tokenizer.eos_id}
        # An answer laid out by a chat template ends with a control token of it.
        ends = own_end | self.tokenizer.control_tokens().keys()
        name = self.image_name(index)
        # `repr` so that a name with line breaks stays one.
        parts, begin, before = ([] if name is None else [f"<image: {repr(name)[1:-1]}>"]), 0, ""
        for end in edges:
            # Decoded from the start each time: on its own, a piece would lose a space that it opens with.
            text = self.tokenizer.decode(tokens[:end])
            part = text[len(before) :] + ("<end>" if tokens[end - 1] in (ends if learned[begin] else own_end) else "")
            parts.append(f"«{part}»" if learned[begin] else part)
            begin, before = end, text
        return "".join(parts)

    def _rows(self) -> int:
        return self.pictures.place.rows

    def _picture_start(self, tokens: np.ndarray) -> int:
        return self.pictures.place.start(tokens, self.tokenizer.start_ids)


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
        for note in (*entry.source.notes, *_unused_settings(entry, dialog, pictures is not None))
    ]
    omissions = Omissions([str(entry.path) for entry in entries], unused)
    images = ImageFinder([entry.image_root for entry in entries], threads) if pictures else None
    reader = DocumentReader(entries, tokenizer, omissions, dialog=dialog, clock=clock, trained=trained, images=images)
    asked = any(entry.prompt_type == CHAT for entry in entries)
    cuts = Cuts(max_words, source_max_len, target_max_len)
    identity = _identity(entries, tokenizer, cuts, dialog, _digest(reader) if asked else None)
    identity |= {"trained": asdict(trained)} if trained else {}
    identity |= {"pictures": asdict(pictures) | {"transform": image_transform}} if pictures else {}
    # What earlier versions kept of such entries may lack documents.
    each = {"questions": "each"} if any(entry.preprocess == "single_turn_llava" for entry in entries) else {}
    cached = cache_dir / f"{_fingerprint(identity | each)}.safetensors" if cache_dir else None
    arrays = _from_cache(cached, omissions, reader, images, threads) if cached else None
    if made := arrays is None:
        arrays = tokenized(reader.documents(), entries, tokenizer, cuts, threads, omissions, pictures)
        arrays = arrays | (images.table(arrays.pop(DOCUMENTS)).arrays if images else {})
        if len(arrays["offsets"]) == 1:
            found = f"{some(omissions.files)}: not one record can be trained on; known shapes: {known_shapes()}."
            raise DataError("\n".join([found, *omissions.lines()]))
    omissions.check(arrays["origins"], max_skipped)
    if cached and made:
        _to_cache(cached, arrays, omissions, reader)
    found = Pictures(pictures, image_transform, ImageTable(images.roots, arrays)) if pictures else None
    return Corpus(arrays, omissions, _completed(identity, reader, found), tokenizer, reader.told, found)


def _digest(reader: DocumentReader) -> str:
    """Of the chat template that is at work."""
    return hashlib.sha256(reader.chat.definition.encode()).hexdigest()[:_DIGITS]


def _unused_settings(entry: DataEntry, dialog: bool, pictures: bool) -> list[str]:
    """A sentence for each setting of an entry that has no effect."""
    notes = ["root is not used: the model takes no images"] * bool(entry.root and not pictures)
    notes += ["preprocess is not used with --dialog"] * bool(dialog and entry.preprocess)
    if dialog and entry.prompt_type not in (CHAT, DIALOG) and "prompt_type" in entry.model_fields_set:
        notes.append(f"prompt_type {entry.prompt_type} is not used: --dialog lays conversations out its own way")
    return notes


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


def _completed(identity: dict[str, Any], reader: DocumentReader, pictures: Pictures | None) -> dict[str, Any]:
    """The identity with what was told of the records, except where earlier versions made the same documents.

    Images are part of it by their names, which the data hold, and by which of them cannot be used.
    """
    told = reader.told
    shapes = zip(told.shapes, told.layouts, told.earlier, strict=True)
    files = [
        {name: value for name, value in file.items() if name != "shape"}
        | ({} if earlier else {"shape": shape, "layout": layout})
        for file, (shape, layout, earlier) in zip(identity["META"], shapes, strict=True)
    ]
    chat = {_CHAT_TEMPLATE: _digest(reader)} if CHAT in told.layouts else {}
    unusable = pictures and pictures.images.unusable
    return identity | {"META": files} | chat | ({"unusable_images": unusable[:_DIGITS]} if unusable else {})


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


def _from_cache(
    path: Path, omissions: Omissions, reader: DocumentReader, images: ImageFinder | None, threads: int
) -> dict[str, np.ndarray] | None:
    """The arrays kept at `path`; fills `omissions` and what `reader` has told from it.

    None where there are none, or the file is damaged, of an earlier version, or laid out by another chat template, or
    where a file of an image is not as it was.
    """
    names = ("tokens", "learned", "offsets", "origins", *(ImageTable.ARRAYS if images else ()))
    try:
        # As torch tensors, since the library maps those and copies NumPy's.
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name).numpy() for name in names}
    except (OSError, SafetensorError):
        return None
    if not metadata.keys() >= {*_CACHED, *_TOLD, _CHAT_TEMPLATE}:
        return None
    laid_out_by = json.loads(metadata[_CHAT_TEMPLATE])
    if laid_out_by and (reader.tokenizer.chat_template is None or _digest(reader) != laid_out_by):
        return None
    if images and not ImageTable(images.roots, arrays).unchanged(threads):
        return None
    for names, kept in ((_CACHED, omissions), (_TOLD, reader.told)):
        for name in names:
            setattr(kept, name, json.loads(metadata[name]))
    return arrays
