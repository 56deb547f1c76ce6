"""Counts the records and keys that a run does not use, and why, for the report before training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from accessory.errors import DataError

_SHOWN = 3  # records named per cause
_LONGEST = 200  # characters of an example
_LINES = 30  # of each kind in a report

Origin = tuple[int, int, int]
"""Where a record comes from: the number of its entry in the data config, and `Record.line` and `Record.number`."""


class UnusableRecord(Exception):
    """A record that cannot be trained on; the message is the cause, equal for records of the same fault.

    example: what this record has at fault, if the cause alone does not tell it: the name of a file.
    """

    def __init__(self, cause: str, example: str = "") -> None:
        super().__init__(cause)
        self.example = example


@dataclass
class Omissions:
    """What the report says of the data: what was skipped, not used or cut, and how files were read.

    files: the file of each entry. settings: (number of the entry, a setting of it that has no effect). notes: (number
    of the entry, how its file was read). skipped: cause -> records. examples: cause -> what one of these has at fault.
    unused: key that no layout reads -> (number of records that have it, the first of them). documents: number of those
    that are used. truncated: of those cut at --max_words; cut_answers: of these that lose an answer's end. cut_sources,
    cut_targets: cut at --source_max_len and --target_max_len. longest, longest_source, longest_target: the most tokens
    before the flag of that length cuts any.
    """

    files: list[str]
    settings: list[tuple[int, str]] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)
    skipped: dict[str, list[Origin]] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    unused: dict[str, tuple[int, Origin]] = field(default_factory=dict)
    documents: int = 0
    truncated: int = 0
    cut_answers: int = 0
    cut_sources: int = 0
    cut_targets: int = 0
    longest: int = 0
    longest_source: int = 0
    longest_target: int = 0

    def skip(self, cause: str, origin: Origin, example: str = "") -> None:
        """Count a record that cannot be used."""
        self.skipped.setdefault(cause, []).append(origin)
        if example:
            self.examples.setdefault(cause, example)

    def ignore(self, keys: Iterable[str], origin: Origin) -> None:
        """Count the keys of a used record that were not used."""
        for key in keys:
            count, first = self.unused.get(key, (0, origin))
            self.unused[key] = count + 1, first

    def where(self, origin: Origin) -> str:
        """`file:line`, and the record's number where that is not 0."""
        entry, line, number = origin
        return f"{self.files[entry]}:{line}" + (f" record {number}" if number else "")

    def lines(self) -> list[str]:
        """One line for each note, cause and key, with the first records that have it."""
        notes = [f"{self.files[entry]}: {note}" for entry, note in (*self.settings, *self.notes)]
        skipped = []
        for cause, origins in self.skipped.items():
            shown = [*map(self.where, origins[:_SHOWN])] + ["..."] * (len(origins) > _SHOWN)
            such = f", such as {self.examples[cause]!r:.{_LONGEST}}" if cause in self.examples else ""
            skipped.append(f"skipped {len(origins):,}: {cause}{such} ({', '.join(shown)})")
        unused = [
            f"not used: {key} of {count:,} records, from {self.where(first)} on"
            for key, (count, first) in self.unused.items()
        ]
        return self._cuts() + [line for kind in (notes, skipped, unused) for line in _first(kind)]

    def _cuts(self) -> list[str]:
        """A line for each limit that cut documents."""
        within = f", {self.cut_answers:,} of them within an answer, whose end is not learned" * bool(self.cut_answers)
        cuts = (
            ("max_words", self.truncated, within, self.longest),
            ("source_max_len", self.cut_sources, ", whose questions lose their ends", self.longest_source),
            ("target_max_len", self.cut_targets, ", the ends of whose answers are not learned", self.longest_target),
        )
        return [
            f"{'warning: ' * bool(lost)}cut short at --{flag}: {count:,} of {self.documents:,} documents{lost}; "
            f"--{flag} {longest} cuts none"
            for flag, count, lost, longest in cuts
            if count
        ]

    def check(self, origins: np.ndarray, most: float) -> None:
        """Raise `DataError` where more than the share `most` of all records was skipped.

        `origins` int32 [documents, 3] are those of the documents that were made; a record may have made several.
        """
        used = len(np.unique(origins, axis=0))
        skipped = sum(map(len, self.skipped.values()))
        if skipped > most * (used + skipped):
            raise DataError(
                f"{skipped:,} of {used + skipped:,} records cannot be used, more than --max_skipped {most:g} allows:\n"
                + "\n".join([*self.lines(), "Mend them, or give a larger --max_skipped."])
            )


def _first(lines: list[str]) -> list[str]:
    """At most `_LINES` lines, and how many more there are."""
    more = len(lines) - _LINES
    return lines if more <= 0 else [*lines[:_LINES], f"... and {more:,} more like the last"]
