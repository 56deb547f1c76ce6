"""Finds the files that a path of the data config names: one, those of a directory, of a pattern, of a known name."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accessory.data.published import PUBLISHED, published_files, published_name
from accessory.data.readers import SUFFIXES, is_data
from accessory.data.readers.json_list import HELD_OUT
from accessory.data.readers.opening import data_suffix, is_packed
from accessory.data.records import some
from accessory.errors import DataError, is_there, nearest
from accessory.tokenizer.sniff import what_is

DATA_DIR = Path("data")
"""Where data sets are looked for if `--data_dir` says nothing."""
NAMES = f"{', '.join(SUFFIXES)}, or .gz of these"
"""The suffixes of data files, for a message."""
_REMEDIES = {
    ".xlsx": "save the sheet as .csv in UTF-8",
    ".xls": "save the sheet as .csv in UTF-8",
    ".pkl": "unpickling would run its code; write it as JSON Lines",
    **dict.fromkeys((".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst"), "unpack it first"),
}
_DESCRIBING = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True)
class Found:
    """Data files in the order they are read in, and what to say of how they were found."""

    files: list[Path]
    notes: list[str] = field(default_factory=list)


def find_files(given: str, folders: Sequence[Path], data_dir: Path) -> Found:
    """The data files that `given` names, looked for in each of `folders`, then in `data_dir`.

    Raises `DataError` where there are none, naming what is there, the nearest name, or what to download.
    """
    for folder in folders:
        if is_there(folder / given):
            return _of_path(folder / given)
    if any(mark in given for mark in "*?["):
        return _of_pattern(given, (*folders, data_dir))
    if name := published_name(given):
        return _of_name(name, data_dir)
    if is_there(data_dir / given):
        return _of_path(data_dir / given)
    raise DataError(_nowhere(given, folders, data_dir))


def path_fault(path: Path) -> str | None:
    """The error of a file of a known kind that is not read here; None for others."""
    remedy = _REMEDIES.get(path.suffix.lower())
    return f"{path}: {path.suffix} files are not read here; {remedy}." if remedy else None


def _of_path(path: Path) -> Found:
    if path.is_dir():
        return _of_directory(path)
    if fault := path_fault(path):
        raise DataError(fault)
    if not is_data(path):
        raise DataError(f"path {path} is not a data file: found {what_is(path)}; expected one of {NAMES}.")
    return Found([path])


def _of_directory(directory: Path) -> Found:
    if (directory / "dataset_dict.json").is_file():
        return _of_splits(directory)
    if (directory / "state.json").is_file():
        return _saved(directory)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and not _is_hidden(path, directory))
    data = [path for path in files if is_data(path) and path.name not in _DESCRIBING]
    kept = [path for path in data if data_suffix(path) != ".txt"] or data
    kept = [path for path in kept if not (is_packed(path) and path.with_suffix("") in kept)]
    kept = _without_held_out(kept, directory)
    if not kept:
        found = some([str(path.relative_to(directory)) for path in files]) or "nothing"
        raise DataError(f"{directory}: is a directory without a data file ({NAMES}); found {found}.")
    return Found(kept, [_told(directory, files, kept)])


def _is_hidden(path: Path, directory: Path) -> bool:
    """Whether it lies in a folder, or has a name, that programs use for themselves."""
    return path.name.startswith("cache-") or any(part[0] in "._" for part in path.relative_to(directory).parts)


def _without_held_out(files: list[Path], directory: Path) -> list[Path]:
    """The files without those whose names say test or validation, if others say train."""
    words = [set(re.split(r"[^a-z]+", str(path.relative_to(directory)).lower())) for path in files]
    if not any("train" in said for said in words):
        return files
    return [path for path, said in zip(files, words, strict=True) if "train" in said or not said & HELD_OUT]


def _told(directory: Path, files: list[Path], kept: list[Path]) -> str:
    names = [str(path.relative_to(directory)) for path in files if path not in kept]
    left = f"; not read: {some(names)}" if names else ""
    return f"{len(kept):,} files of the directory {directory}{left}"


def _of_splits(directory: Path) -> Found:
    """The split `train` of what `datasets` saved as a `DatasetDict`."""
    splits = _described(directory / "dataset_dict.json", "splits")
    if "train" not in splits:
        remedy = f"name one: {directory}/{splits[0] if splits else 'SPLIT'}"
        raise DataError(f"{directory}: has the splits {some(splits) or '(none)'} and no train; {remedy}.")
    found, others = _saved(directory / "train"), [split for split in splits if split != "train"]
    left = f"; not read: {some(others)}" if others else ""
    return Found(found.files, [f"split train of the directory {directory}{left}"])


def _saved(directory: Path) -> Found:
    """The files of what `datasets` saved by `save_to_disk`, in their order."""
    parts = _described(directory / "state.json", "_data_files")
    names = [part.get("filename") for part in parts if isinstance(part, dict)]
    files = [directory / name for name in names if isinstance(name, str) and name == Path(name).name]
    if missing := [path for path in files if not is_there(path)]:
        raise DataError(f"{directory}: state.json names {missing[0].name}, which is not there; save it anew.")
    if not files or len(files) != len(parts):
        raise DataError(f"{directory}: state.json names no files under _data_files; save it anew by save_to_disk.")
    return Found(files)


def _described(path: Path, key: str) -> list[Any]:
    """The list under a key of a JSON file that `datasets` wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        found = error
    if not isinstance(found, list):
        raise DataError(
            f"{path}: found {what_is(path)}; expected an object with the list {key}, as datasets writes it."
        )
    return found


def _of_pattern(pattern: str, folders: Sequence[Path]) -> Found:
    """The data files that match, sorted; a directory that matches gives its own."""
    for folder in folders:
        matches = _matches(pattern, folder)
        found = [_of_directory(path).files if path.is_dir() else [path] for path in matches if _is_source(path)]
        if files := list(dict.fromkeys(path for group in found for path in group)):
            others = [path.name for path in matches if not _is_source(path)]
            return Found(files, [f"{len(files):,} files match{f'; not read: {some(others)}' if others else ''}"])
    looked = " or ".join(str(folder.resolve()) for folder in dict.fromkeys(folders))
    beside = some([path.name for folder in folders for path in _beside(pattern, folder)])
    raise DataError(f"{pattern}: no data file ({NAMES}) in {looked} matches; beside it: {beside or 'nothing'}.")


def _is_source(path: Path) -> bool:
    return path.is_dir() or is_data(path)


def _of_which(file: str) -> str | None:
    """The data set that has a file of this name."""
    return next((name for name, data in PUBLISHED.items() if file in data.files), None)


def _beside(given: str, folder: Path) -> list[Path]:
    """What lies where `given` would, without what is hidden."""
    return [path for path in _matches(str(Path(given).parent / "*"), folder) if not path.name.startswith(".")]


def _matches(pattern: str, folder: Path) -> list[Path]:
    root = Path(Path(pattern).anchor)
    relative = str(Path(pattern).relative_to(root)) if Path(pattern).is_absolute() else pattern
    try:
        return sorted((root if Path(pattern).is_absolute() else folder).glob(relative))
    except (ValueError, OSError):
        return []


def _of_name(name: str, data_dir: Path) -> Found:
    data, found = PUBLISHED[name], published_files(name, data_dir)
    if not found:
        raise DataError(
            f"{name} ({data.what}) is not in --data_dir {data_dir}: looked for "
            f"{', '.join(data.files) or 'data files'} in {data_dir / name} and {data_dir}. "
            f"Download it: {data.remedy(name, data_dir)}"
        )
    if found[0].is_dir():
        return _of_directory(found[0])
    notes = [f"{name}: {data.what}"] + [f"{len(found):,} files of it"] * (len(found) > 1)
    return Found(found, notes)


def _nowhere(given: str, folders: Sequence[Path], data_dir: Path) -> str:
    """The message on a path that is nowhere: where it was looked for, and what may be meant."""
    looked = [*dict.fromkeys(str(folder.resolve()) for folder in folders), f"--data_dir {data_dir}"]
    there = [path.name for folder in folders for path in _beside(given, folder)]
    hint = nearest(Path(given).name, there) or nearest(given, PUBLISHED)
    if not hint and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", given) and not is_data(Path(given)):
        local = data_dir / given.partition("/")[2]
        hint = (
            " If this is a name on the Hugging Face Hub, download it first: "
            f"hf download {given} --repo-type dataset --local-dir {local}, then give {local}."
        )
    if not hint and (name := _of_which(Path(given).name)):
        hint = f" It is a file of the data set {name}; give that name to be told what to download."
    known = "" if hint or "/" in given or "." in given else f" Known names: {', '.join(PUBLISHED)}."
    where = "is not there" if Path(given).is_absolute() else f"is neither in {' nor in '.join(looked)}"
    return f"path {given} {where}.{hint}{known}"
