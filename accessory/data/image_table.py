"""The image files that records name: examined before training, and kept as flat arrays, since there may be many."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from accessory.data.image_files import ImageFault, check_image
from accessory.data.omissions import UnusableRecord

NO_IMAGE = -1
_BLOCK = 1024  # files looked at together
_UNKNOWN = (-1, -1)  # state of a file that is not there, or not to be touched
_OUTSIDE = "lies outside of the directory of images, which root in the YAML names"
State = tuple[int, int]
"""What tells that a file was changed: its size in bytes, and its time in nanoseconds."""


class ImageTable:
    """Image files, and the documents that they belong to.

    roots: for each entry of the data config, the directory of its images. The arrays: `names` uint8, all names end to
    end; `bounds` int64 [files + 1], where each begins; `entries` int32 [files], which of them names the file; `sizes`
    and `times` int64 [files], the `State` of each when it was examined; `usable` bool [files]; `of_document` int32
    [documents], the number of each one's file, or `NO_IMAGE`.
    """

    ARRAYS = ("names", "bounds", "entries", "sizes", "times", "usable", "of_document")

    def __init__(self, roots: Sequence[Path], arrays: dict[str, np.ndarray]) -> None:
        self.roots, self.arrays = roots, {name: arrays[name] for name in self.ARRAYS}
        self.of_document: np.ndarray = arrays["of_document"]

    def name(self, document: int) -> str | None:
        """The name of a document's image, as the record has it; None without any."""
        number = self.of_document[document]
        return None if number == NO_IMAGE else self._name(number)

    def path(self, document: int) -> Path | None:
        """Where a document's image lies; None without any."""
        number = self.of_document[document]
        return None if number == NO_IMAGE else Path(_path(self._root(number), self._name(number)))

    def unchanged(self, threads: int = 1) -> bool:
        """Whether all files are as they were when they were examined, those that were not there included."""
        roots = {root: _Root(root) for root in set(self.roots)}
        same = partial(self._unchanged, roots)
        with ThreadPoolExecutor(max(threads, 1)) as pool:  # by blocks, since each call that waits takes memory
            return all(pool.map(same, range(0, len(self.arrays["sizes"]), _BLOCK)))

    @property
    def unusable(self) -> str:
        """A digest of the names of files that cannot be used, in hexadecimal digits; empty if all can be."""
        numbers = np.flatnonzero(~self.arrays["usable"]).tolist()
        named = [(int(self.arrays["entries"][number]), self._name(number)) for number in numbers]
        return hashlib.sha256(repr(sorted(named)).encode()).hexdigest() if named else ""

    def _unchanged(self, roots: dict[Path, _Root], first: int) -> bool:
        numbers = range(len(self.arrays["sizes"]))[first : first + _BLOCK]
        states = [roots[self._root(number)].state(self._name(number)) for number in numbers]
        sizes, times = (self.arrays[name][first : first + _BLOCK].tolist() for name in ("sizes", "times"))
        return states == [*zip(sizes, times, strict=True)]

    def _root(self, number: int) -> Path:
        return self.roots[self.arrays["entries"][number]]

    def _name(self, number: int) -> str:
        begin, end = self.arrays["bounds"][number : number + 2]
        return self.arrays["names"][begin:end].tobytes().decode()


class ImageFinder:
    """Examines image files as records name them, each once, by so many threads."""

    def __init__(self, roots: Sequence[Path], threads: int = 1) -> None:
        self.roots = roots
        self._examined = [_Root(root) for root in roots]
        self._pool = ThreadPoolExecutor(max(threads, 1))
        self._names, self._bounds, self._entries = bytearray(), array("q", [0]), array("i")
        self._sizes, self._times = array("q"), array("q")
        self._causes: list[str] = []
        self._faults = array("i")  # of each file the number of its cause, -1 for none
        # Of each file, sorted by the first: a digest of its entry and name, and its number.
        self._digests, self._numbers = np.zeros(0, np.uint64), np.zeros(0, np.int32)

    def find(self, entry: int, names: Sequence[str | None]) -> list[int]:
        """The numbers of files that an entry's records name; `NO_IMAGE` where there is no name."""
        digests = {name: _digest(entry, name) for name in names if name is not None}
        known = self._known(digests)
        new = [name for name in digests if name not in known]
        known |= {name: len(self._sizes) + place for place, name in enumerate(new)}
        for name, (state, fault) in zip(new, self._pool.map(self._examined[entry].examine, new), strict=True):
            self._add(entry, name, state, fault)
        order = sorted(new, key=digests.__getitem__)
        sorted_in = np.array([digests[name] for name in order], np.uint64)
        places = np.searchsorted(self._digests, sorted_in)
        self._digests = np.insert(self._digests, places, sorted_in)
        self._numbers = np.insert(self._numbers, places, [known[name] for name in order])
        return [NO_IMAGE if name is None else known[name] for name in names]

    def fault(self, number: int, name: str | None) -> UnusableRecord | None:
        """Why the file of this number, which a record calls `name`, cannot be used; None if it can."""
        if number == NO_IMAGE or self._faults[number] < 0:
            return None
        return UnusableRecord(self._causes[self._faults[number]], name)

    def table(self, of_document: np.ndarray) -> ImageTable:
        """All files, and whose they are: `of_document` as in `ImageTable`."""
        self._pool.shutdown()
        names, usable = np.array(self._names, np.uint8), np.asarray(self._faults) < 0
        files = (names, self._bounds, self._entries, self._sizes, self._times, usable, of_document)
        return ImageTable(self.roots, dict(zip(ImageTable.ARRAYS, map(np.asarray, files), strict=True)))

    def _known(self, digests: dict[str, int]) -> dict[str, int]:
        """The names that have a number already, and it."""
        if not len(self._digests):
            return {}
        wanted = np.array([*digests.values()], np.uint64)
        places = np.searchsorted(self._digests, wanted).clip(max=len(self._digests) - 1)
        found, numbers = self._digests[places] == wanted, self._numbers[places].tolist()
        return {name: n for name, n, hit in zip(digests, numbers, found, strict=True) if hit and self._is(n, name)}

    def _is(self, number: int, name: str) -> bool:
        """Whether a file has this name: two may have one digest."""
        return self._names[self._bounds[number] : self._bounds[number + 1]] == name.encode()

    def _add(self, entry: int, name: str, state: State, fault: str | None) -> None:
        self._names += name.encode()
        self._bounds.append(len(self._names))
        self._entries.append(entry)
        self._sizes.append(state[0])
        self._times.append(state[1])
        if fault is not None and fault not in self._causes:
            self._causes.append(fault)
        self._faults.append(-1 if fault is None else self._causes.index(fault))


class _Root:
    """A directory of images, which no name may leave."""

    def __init__(self, path: Path) -> None:
        self._path, self._whole, self._real = path, os.path.abspath(path), os.path.realpath(path)

    def examine(self, name: str) -> tuple[State, str | None]:
        """A file's state, and why it cannot be used, if it cannot."""
        state = self.state(name)
        try:
            if not self._holds(name, real=True):
                raise ImageFault(_OUTSIDE)
            check_image(Path(_path(self._path, name)))
        except ImageFault as fault:
            return state, f"its image {fault}"
        return state, None

    def state(self, name: str) -> State:
        """A file's state; of one outside, whose path alone says so, nothing is asked."""
        try:
            if self._holds(name, real=False):
                found = os.stat(_path(self._path, name))
                return found.st_size, found.st_mtime_ns
        except (OSError, ValueError):
            pass
        return _UNKNOWN

    def _holds(self, name: str, real: bool) -> bool:
        """Whether a name's path lies below this directory; real: where its links lead, too."""
        path = _path(self._path, name)
        below = any(_is_below(os.path.abspath(path), root) for root in (self._whole, self._real))
        try:
            return below and (not real or _is_below(os.path.realpath(path), self._real))
        except (OSError, ValueError):  # such as a zero byte, which `check_image` will name
            return below


def _path(root: Path, name: str) -> str:
    return os.path.join(root, name)


def _is_below(path: str, root: str) -> bool:
    return path.startswith(root if root.endswith(os.sep) else root + os.sep)


def _digest(entry: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, salt=entry.to_bytes(8)).digest())
