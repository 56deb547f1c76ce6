"""Which files a pretraining run reads, as its `--data_meta_path` lists them, and what identifies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accessory.errors import DataError, is_file, nearest
from accessory.tokenizer.sniff import what_is

TEXTS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt"}
"""Suffix of a file of raw text -> its kind."""
PACKED = ".safetensors"
"""Suffix of a file of tokens, which tools/pack_data.py writes."""
_SAMPLES, _SAMPLE_BYTES = 16, 4096


@dataclass(frozen=True)
class RawFile:
    """One file. kind: a value of `TEXTS`, or `packed`. size: its bytes when the run began."""

    path: Path
    kind: str
    size: int

    def check_size(self) -> None:
        """Raise `DataError` where the file is gone, or has another size by now."""
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}).") from error
        if size != self.size:
            raise DataError(f"{self.path}: has {size:,} bytes; it had {self.size:,} when the run looked at it first.")


def read_meta(meta: Path, root: Path | None, packed: bool) -> tuple[list[RawFile], RawFile]:
    """(files to train on, the validation file) of a JSON list of names, the last of which is the validation file.

    Names are absolute or relative to `root`, which is the list's own folder if it is None. packed: whether files of
    tokens are expected. Raises `DataError`, naming each entry that is at fault.
    """
    names, faults, found = _names(meta), [], []
    for place, name in enumerate(names):
        path = (meta.parent if root is None else root) / name
        fault = _fault(path, packed)
        if fault is None:
            found.append(RawFile(path, "packed" if packed else TEXTS[path.suffix.lower()], path.stat().st_size))
        elif len(faults) < 5:
            faults.append(f"{meta}: entry {place + 1}, {name!r}: {fault}")
    if faults:
        raise DataError("\n".join(faults))
    if len(found) < 2:
        raise DataError(
            f"{meta}: lists {len(found)} file; expected two or more: the last one is evaluated on, the others are "
            "trained on."
        )
    return found[:-1], found[-1]


def trained_on_too(files: Sequence[RawFile], held_out: RawFile) -> list[str]:
    """What to tell the user where the validation file is among those that are trained on."""
    if held_out.path.resolve() not in {file.path.resolve() for file in files}:
        return []
    return [f"{held_out.path} is trained on, too: figures on it do not tell what was learned"]


def _names(meta: Path) -> list[str]:
    expected = 'expected a JSON list of file names, such as ["part-0.jsonl", "part-1.jsonl", "validation.jsonl"]'
    try:
        names = json.loads(meta.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"--data_meta_path {meta}: cannot be read ({error.strerror}); {expected}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"--data_meta_path {meta}: found {what_is(meta)} ({error}); {expected}.") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"--data_meta_path {meta}: found {json.dumps(names)[:80]}; {expected}.")
    return names


def _fault(path: Path, packed: bool) -> str | None:
    """Why the file cannot be read; None: it can, as far as its name says."""
    suffix = path.suffix.lower()
    if suffix == ".pkl":
        return (
            "a pickle could run any code when it is read, and never is; write the tokens of the text it was made from "
            "anew: python tools/pack_data.py TEXT... TARGET --tokenizer_path TOKENIZER"
        )
    if suffix == ".gz":
        return "packed by gzip, in the midst of which nothing can be read; unpack it first: gzip -d"
    if packed and suffix != PACKED:
        also = "; leave out --packed_data to train on text" if suffix in TEXTS else ""
        return f"--packed_data expects files of tokens ({PACKED}), which tools/pack_data.py writes{also}"
    if not packed and suffix == PACKED:
        return "holds tokens; give --packed_data to train on them"
    if not packed and suffix not in TEXTS:
        return f"expected one of {', '.join(TEXTS)}, or with --packed_data {PACKED}"
    if not is_file(path):
        near = nearest(path.name, [each.name for each in path.parent.iterdir()]) if path.parent.is_dir() else ""
        return f"there is no file {path}.{near}"
    return None


def identity_of(files: Sequence[RawFile]) -> dict[str, Any]:
    """What determines the files, as JSON: how many, their bytes, and a digest of a few places spread over each."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.kind} {file.size}\n".encode())
        _add_samples(digest, file)
    return {"files": len(files), "bytes": sum(file.size for file in files), "sampled": digest.hexdigest()[:32]}


def _add_samples(digest: Any, file: RawFile) -> None:
    try:
        with file.path.open("rb") as opened:
            last = max(file.size - _SAMPLE_BYTES, 0)
            for place in range(_SAMPLES):
                opened.seek(last * place // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE_BYTES))
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read ({error.strerror}).") from error
