"""Support tables of docs/: each cell is the outcome of the test that it stands for, "tested" or "refused".

The test says the outcome at its end, and fails where the page says another; `tests/run.sh --write-tables FILE`
writes it instead. Rows and columns of a table are what its tests are parametrized by: each cell has a test behind it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DOCS = Path(__file__).resolve().parent.parent / "docs"


@dataclass(frozen=True)
class SupportTable:
    """A table between the markers `name` on a page of docs/.

    head: names of the first columns; rows: name of a row -> what stands in its first columns; columns: the others.
    """

    page: str
    name: str
    head: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]
    columns: tuple[str, ...]

    def filled(self, states: dict[tuple[str, str], str]) -> str:
        """The Markdown, with the state of each cell (row, column); cells without one are empty."""
        lines = [_line(*self.head, *self.columns), "|" + "---|" * (len(self.head) + len(self.columns))]
        for row, first in self.rows.items():
            lines.append(_line(*first, *(states.get((row, column), "") for column in self.columns)))
        return "\n".join(lines)

    def states(self, now: str) -> dict[tuple[str, str], str]:
        """State of each of the table's cells in the Markdown `now`, whatever other rows and columns are there."""
        head, _, *lines = ([word.strip() for word in line.split("|")[1:-1]] for line in now.splitlines())
        start = len(self.head)
        found = {tuple(words[:start]): dict(zip(head[start:], words[start:], strict=True)) for words in lines}
        cells = (
            (row, column, found.get(first, {}).get(column, ""))
            for row, first in self.rows.items()
            for column in self.columns
        )
        return {(row, column): state for row, column, state in cells if state}

    def say(self, row: str, column: str, state: Literal["tested", "refused"], *, write: bool) -> None:
        """What a test has shown: the page must say so, or (`write`) is made to."""
        path = DOCS / self.page
        marked = re.compile(rf"(?<=<!-- {self.name} -->\n).*?(?=\n<!-- /{self.name} -->)", re.DOTALL)
        text = path.read_text()
        states = self.states(marked.search(text)[0])
        if write:
            path.write_text(marked.sub(lambda _: self.filled(states | {(row, column): state}), text))
            return
        there = states.get((row, column), "nothing")
        assert there == state, f"docs/{self.page} says {there}; tests/run.sh --write-tables writes the outcome"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
