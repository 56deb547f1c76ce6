"""From the files of a data config to documents: each file's shape is told, and its records are laid out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import NamedTuple

from accessory.data.image_table import NO_IMAGE, ImageFinder
from accessory.data.messages import Conversation, Question
from accessory.data.meta_config import DataEntry
from accessory.data.omissions import Omissions, Origin, UnusableRecord
from accessory.data.reading import read_entries
from accessory.data.record_images import captioned, image_name, without_image, without_marks
from accessory.data.records import Record
from accessory.data.shapes import OTHER_NAMES, SHAPES, Said, shape_of, tell, unfit
from accessory.data.templates import (
    CHAT,
    DIALOG,
    Segment,
    as_before,
    conversation_from,
    documents_of,
    each_question,
    layout_of,
    unused_keys,
)
from accessory.tokenizer import Chat, Tokenizer

_TOLD_BY = 1000
"""So many records, the first ones, tell the shape of a file."""
_BLOCK = 1024  # records whose images are examined together


@dataclass
class Layouts:
    """What was told of each entry's records. shapes: None where no record has one. layouts: of `PROMPT_LAYOUTS`.

    earlier: whether earlier versions, which knew two shapes, make the same documents. system: the words of the system
    that most conversations begin with, if most begin with the same.
    """

    shapes: list[str | None] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)
    earlier: list[bool] = field(default_factory=list)
    system: str | None = None


class LaidOut(NamedTuple):
    """A document: its record's origin, its text in segments, and the number of its image's file, or `NO_IMAGE`."""

    origin: Origin
    segments: list[Segment]
    image: int


class _Illustrated(NamedTuple):
    """A record without its image, the number of that file, and why it cannot be used, if it cannot."""

    record: Record
    image: int = NO_IMAGE
    fault: UnusableRecord | None = None


@dataclass(frozen=True)
class Trained:
    """How a model was trained that is now asked the questions of the data, and so how they are laid out.

    layouts: those of its questions, the one with most documents first; empty where unknown. system: words of the system
    for questions that have no place for any. stated: one of `PROMPT_LAYOUTS` for all questions, which the user chose.
    """

    layouts: tuple[str, ...] = ()
    system: str | None = None
    stated: str | None = None

    def layout(self, own: str) -> str:
        """The layout of questions that would be laid out as `own` without such a model."""
        followed = own if own in self.layouts or not self.layouts else self.layouts[0]
        return self.stated or followed


def layout_note(trained: Sequence[str], asked: str) -> str:
    """A note if a model was trained on several layouts, or on others than questions are `asked` in; else empty."""
    names = ", ".join(trained)
    if trained and asked not in trained:
        return f"--system_prompt {asked}: the part was trained on questions laid out as {names}, and may answer worse."
    if len(trained) > 1:
        return f"The part was trained on questions laid out as {names}; these are asked as {asked} (--system_prompt)."
    return ""


class DocumentReader:
    """Reads the files of `entries` into documents; what is not used goes to `omissions`.

    dialog: whether conversations have the layout `dialog` where they are not asked for in `chat`. clock: the time for
    templates that print it. trained: what a model was trained on that is asked them; absent: they are to train one.
    images: finds the images of records; absent: the model takes none, and records that have one are not used.
    """

    def __init__(
        self,
        entries: list[DataEntry],
        tokenizer: Tokenizer,
        omissions: Omissions,
        *,
        dialog: bool = False,
        clock: datetime | None = None,
        trained: Trained | None = None,
        images: ImageFinder | None = None,
    ) -> None:
        self.entries, self.omissions, self.told = entries, omissions, Layouts()
        self._trained, self._images = trained or Trained(), images
        self.tokenizer, self._clock, self._dialog = tokenizer, clock or datetime.now(), dialog
        self._systems: Counter[str | None] = Counter()

    @cached_property
    def chat(self) -> Chat:
        """The checkpoint's chat template. Raises `TokenizerError` where there is none that can be learned from."""
        chat = Chat(self.tokenizer, self._clock)
        _ = chat.stop_ids  # works out how the template ends an answer
        return chat

    def documents(self) -> Iterator[LaidOut]:
        """All documents in order; `told` is whole when the last one has been given."""
        self._tell_nothing()
        for number, found in groupby(read_entries(self.entries, self.omissions.notes), key=itemgetter(0)):
            records = self._illustrated(number, (record for _, record in found))
            first = list(islice(records, _TOLD_BY))
            self._tell(number, [record for record, *_ in first])
            for one in chain(first, records):
                yield from self._of_record(one, (number, one.record.line, one.record.number))
        if self._systems:
            words, count = self._systems.most_common(1)[0]
            self.told.system = words if 2 * count > self._systems.total() else None

    def _illustrated(self, number: int, records: Iterator[Record]) -> Iterator[_Illustrated]:
        """The records of an entry, their images found."""
        if self.entries[number].preprocess == "caption" and not self._dialog:
            records = map(captioned, records)
        if self._images is None:
            yield from map(_Illustrated, records)
            return
        while block := list(islice(records, _BLOCK)):
            named = [_named(record) for record in block]
            files = self._images.find(number, [name for name, _ in named])
            for record, file, (name, fault) in zip(block, files, named, strict=True):
                yield _Illustrated(without_image(record), file, fault or self._images.fault(file, name))

    def _tell_nothing(self) -> None:
        self.told.shapes = [None] * len(self.entries)
        self.told.layouts = [self._layout(entry, None) for entry in self.entries]
        self.told.earlier = [True] * len(self.entries)

    def _tell(self, number: int, records: list[Record]) -> None:
        """Tell the shape of an entry's records from the first ones."""
        entry, told = self.entries[number], self.told
        readable = [record.fields for record in records if not record.fault]
        name = OTHER_NAMES.get(entry.shape, entry.shape) or tell(readable, self._first(entry))
        told.shapes[number], told.layouts[number] = name, self._layout(entry, name)
        told.earlier[number] = name in (None, self._known_before(entry))
        self.omissions.notes += [(number, note) for note in _said_of(entry, name, told.layouts[number], self._dialog)]

    def _of_record(self, illustrated: _Illustrated, origin: Origin) -> Iterator[LaidOut]:
        number, (record, image, fault) = origin[0], illustrated
        entry, name, layout = self.entries[number], self.told.shapes[number], self.told.layouts[number]
        llava = entry.preprocess == "single_turn_llava" and not self._dialog
        try:
            said = self._said(record, name, entry)
            if fault:
                raise fault
            earlier = as_before(said, layout)
            said = said if image == NO_IMAGE else without_marks(said)
            chat = self.chat if layout == CHAT else None
            parts = [self._with_system(part, layout) for part in (each_question(said) if llava else [said])]
            documents = [one for part in parts for one in documents_of(part, layout, chat, entry.mask_history)]
        except UnusableRecord as cause:
            self.omissions.skip(str(cause), origin, cause.example)
            return
        conversation = parts[0] if isinstance(parts[0], Conversation) else None
        tools = bool(conversation and conversation.tools and chat and chat.takes_tools)
        self.omissions.ignore(unused_keys(record.fields, SHAPES[name], layout, tools), origin)
        self.told.earlier[number] &= earlier and len(parts) == 1  # of several questions they laid out the first alone
        if layout in (CHAT, DIALOG):
            self._systems[conversation.system if conversation else None] += 1
        yield from (LaidOut(origin, segments, image) for segments in documents)

    def _with_system(self, said: Said, layout: str) -> Said:
        """A question behind the system's words that the trained part before it was asked with, if it was."""
        if isinstance(said, Question) and layout in (CHAT, DIALOG) and self._trained.system is not None:
            return conversation_from(said, self._trained.system)
        return said

    def _said(self, record: Record, name: str | None, entry: DataEntry) -> Said:
        """What a record of a file of the shape `name` says. Raises `UnusableRecord`."""
        if record.fault:
            raise UnusableRecord(record.fault)
        if name is None:
            raise unfit(record.fields)
        try:
            said = SHAPES[name].read(record.fields)
        except UnusableRecord as cause:
            other = shape_of(record.fields, (name, *self._first(entry)))
            if other in (name, None):
                raise
            raise UnusableRecord(
                f"{cause}; it has the shape {other}, where the file's is {name}: put those into a file of their own"
            ) from cause
        if isinstance(said, Conversation) and self._dialog and name == "sharegpt":
            return replace(said, tools=None)  # which earlier versions left out, so that their runs can be resumed
        return said

    def _known_before(self, entry: DataEntry) -> str:
        """The shape that earlier versions, which told none, expected of the records."""
        if self._dialog or entry.preprocess == "single_turn_llava":
            return "sharegpt"
        return "caption" if "caption" in (entry.prompt_type, entry.preprocess) else "alpaca"

    def _first(self, entry: DataEntry) -> tuple[str, ...]:
        """The shapes to compare records with before all others."""
        known = self._known_before(entry)
        asked = "prompt_type" in entry.model_fields_set and entry.prompt_type not in (CHAT, DIALOG)
        return (known,) if asked or known == "sharegpt" or entry.preprocess else ()

    def _layout(self, entry: DataEntry, name: str | None) -> str:
        stated = "prompt_type" in entry.model_fields_set or entry.preprocess == "single_turn_llava"
        asked = entry.prompt_type if stated else None
        shape = SHAPES[name or self._known_before(entry)]
        own = layout_of(shape, asked, self._dialog, self.tokenizer.chat_template is not None)
        return own if shape.is_text else self._trained.layout(own)


def _named(record: Record) -> tuple[str | None, UnusableRecord | None]:
    """The name of a record's image, and why there can be none."""
    try:
        return image_name(record.fields), None
    except UnusableRecord as fault:
        return None, fault


def _said_of(entry: DataEntry, name: str | None, layout: str, dialog: bool) -> list[str]:
    """Sentences on how an entry's records are read."""
    if name is None:
        return []
    how = "as shape says" if entry.shape else "told from the keys"
    laid_out = "learned as it stands" if SHAPES[name].is_text else f"laid out as {layout}"
    notes = [f"shape {name} ({', '.join(SHAPES[name].keys)}; {how}), {laid_out}"]
    if SHAPES[name].is_text and "prompt_type" in entry.model_fields_set and entry.prompt_type != layout:
        notes.append(f"prompt_type {entry.prompt_type} is not used: plain text has no prompt")
    elif "prompt_type" in entry.model_fields_set and entry.prompt_type != layout and not dialog:
        notes.append(f"prompt_type {entry.prompt_type} is not used: questions are laid out as {layout}")
    return notes
