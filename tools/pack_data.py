"""Tokenize raw text once, for pretraining with --packed_data:

python tools/pack_data.py part-0.jsonl part-1.parquet validation.txt TARGET --tokenizer_path TOKENIZER
"""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tqdm import tqdm

from accessory.data.raw.documents import UNITS, TextReader
from accessory.data.raw.files import PACKED, TEXTS, RawFile
from accessory.data.raw.packing import encoders, pack
from accessory.entry import from_command_line, run_tool, sources_and_target
from accessory.errors import ConfigError, check_known, is_file
from accessory.tokenizer import open_tokenizer

META = "meta.json"
_AHEAD = 2  # blocks that each process may be ahead of what is written


def main(
    *paths: str,
    tokenizer_path: str = "",
    text_key: str = "",
    txt: str = UNITS[0],
    processes: int = 0,
    max_skipped: float = 0.1,
) -> None:
    """Write the tokens of files of text into the directory TARGET; PATHS end with it.

    Each file of text gives a file of tokens with its name. TARGET/meta.json lists those that were written, in the order
    given, for --data_meta_path: its last file is the validation file.

    Args:
        tokenizer_path: tokenizer.model, tokenizer.json, or a directory holding one.
        text_key: column of a .parquet, or key of a .jsonl, that holds the text; absent: content or text.
        txt: what of a .txt is one document: whole, lines or paragraphs.
        processes: how many encode at once; 0: one for each core.
        max_skipped: largest share of documents that may be unusable.
    """
    *sources, target = sources_and_target(paths)
    check_known("--txt", txt, UNITS)
    if not tokenizer_path:
        raise ConfigError("--tokenizer_path is needed: whose tokens are to be written?")
    if type(processes) is not int or processes < 0:
        raise ConfigError(f"--processes {processes!r}: expected a whole number from 0 on.")
    processes = processes or len(os.sched_getaffinity(0))
    reader, tokenizer = TextReader(str(text_key) or None, txt), open_tokenizer(str(tokenizer_path))
    files = _checked(sources, target)
    target.mkdir(parents=True, exist_ok=True)
    with encoders(Path(str(tokenizer_path)), processes) as pool:
        for file, path in files.items():
            began, count = time.monotonic(), 0
            with tqdm(desc=path.name, unit="token", unit_scale=True, leave=False) as bar:
                for count in pack(file, path, reader, tokenizer, pool, _AHEAD * processes, max_skipped):
                    bar.update(count - bar.n)
            seconds = time.monotonic() - began
            speed = f"{count / seconds:,.0f} tokens/s, {file.size / seconds / 1e6:,.1f} MB/s"
            print(f"{path}: {count:,} tokens in {path.stat().st_size / 1e6:,.1f} MB, {seconds:.1f} s, {speed}")
    (target / META).write_text(json.dumps([path.name for path in files.values()], indent=1) + "\n")
    print(f"{target / META}: {len(files)} files, the last of which is the validation file")


def _checked(sources: list[Path], target: Path) -> dict[RawFile, Path]:
    """Each file of text and the file of tokens to write. Raises `ConfigError` for what is none, or is there already."""
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target}: is a file; expected the directory to write to, as the last argument.")
    if faults := [f"{path}: expected a file of {', '.join(TEXTS)}." for path in sources
                  if not is_file(path) or path.suffix.lower() not in TEXTS]:  # fmt: skip
        raise ConfigError("\n".join(faults))
    names = Counter(path.stem for path in sources)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"{twice[0]}: {names[twice[0]]} files have this name, and would give one; rename them.")
    files = {RawFile(path, TEXTS[path.suffix.lower()], path.stat().st_size): target / f"{path.stem}{PACKED}"
             for path in sources}  # fmt: skip
    if there := [str(path) for path in (*files.values(), target / META) if path.exists()]:
        raise ConfigError(f"{', '.join(there[:3])}: there already; remove it, or give another directory.")
    return files


if __name__ == "__main__":
    run_tool(from_command_line(main))
