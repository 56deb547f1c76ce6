"""Finds out which kind of tokenizer lies at a path."""

from __future__ import annotations

from pathlib import Path

from accessory.errors import TokenizerError, hub_hint
from accessory.tokenizer import bpe_files, hf_json, spm
from accessory.tokenizer.base import StatedTokenizer
from accessory.tokenizer.bpe_files import open_bpe_files
from accessory.tokenizer.gguf_vocab import open_gguf
from accessory.tokenizer.hf_json import open_json
from accessory.tokenizer.sniff import holds_tiktoken, what_is
from accessory.tokenizer.special import read_special_tokens
from accessory.tokenizer.spm import open_sentencepiece
from accessory.tokenizer.tiktoken_ranks import open_tiktoken

_EXPECTED = (
    "expected a .model (sentencepiece, or tiktoken's of Llama 3), .json (tokenizers, or vocab.json with merges.txt) or "
    ".gguf file, or a directory that holds one"
)


def open_tokenizer(path: str | Path) -> StatedTokenizer:
    """The tokenizer at `path`: a `.model`, `.json` or `.gguf` file, or a directory that holds one.

    vocab.json with merges.txt beside it is one, too. BOS, EOS, added tokens and whether a document starts with BOS are
    taken from tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json and config.json
    of the same directory where they say so. A directory that holds both kinds is read from tokenizer.json if
    tokenizer_config.json lies beside it. Raises TokenizerError naming the file, what was found there and what was
    expected.
    """
    path = Path(path)
    file = _choose(path) if path.is_dir() else path
    if not file.is_file():
        raise TokenizerError(f"{file}: found {what_is(file)}; {_EXPECTED}.{hub_hint(file)}")
    if file.suffix == ".gguf":
        return open_gguf(file)
    if file.name in bpe_files.FILE_NAMES:
        return open_bpe_files(file.parent, read_special_tokens(file.parent))
    if file.suffix == ".json":
        return open_json(file, read_special_tokens(file.parent, whole_json=True))
    if file.suffix == ".model":
        reader = open_tiktoken if holds_tiktoken(file) else open_sentencepiece
        return reader(file, read_special_tokens(file.parent))
    raise TokenizerError(f"{file}: found {what_is(file)} named {file.suffix or 'without suffix'!r}; {_EXPECTED}.")


def holds_tokenizer(directory: Path) -> bool:
    """Whether `open_tokenizer(directory)` has a file to read there, GGUF files aside."""
    return _own_file(directory) is not None


def same_tokenizer(one: Path, other: Path) -> bool:
    """Whether two paths are one, or directories with the same vocabulary files and special tokens that say the same.

    False where that is not to be seen without opening them.
    """
    if one == other:
        return True
    if not all(path.is_dir() and holds_tokenizer(path) for path in (one, other)):
        return False
    for name in (hf_json.FILE_NAME, spm.FILE_NAME, *bpe_files.FILE_NAMES):
        there = [path / name for path in (one, other) if (path / name).is_file()]
        if len(there) == 1 or (there and there[0].read_bytes() != there[1].read_bytes()):
            return False
    whole_json = _own_file(one).name == hf_json.FILE_NAME
    return read_special_tokens(one, whole_json=whole_json) == read_special_tokens(other, whole_json=whole_json)


def _choose(directory: Path) -> Path:
    own = _own_file(directory)
    if own is not None:
        return own
    vocabularies = sorted(directory.glob("*.gguf"))
    if len(vocabularies) == 1:
        return vocabularies[0]
    if vocabularies:
        names = ", ".join(file.name for file in vocabularies)
        raise TokenizerError(f"{directory}: found several .gguf files ({names}); expected the path of one of them.")
    raise TokenizerError(f"{directory}: found neither {hf_json.FILE_NAME} nor {spm.FILE_NAME}; {_EXPECTED}.")


def _own_file(directory: Path) -> Path | None:
    """The vocabulary that is read of a directory, or None."""
    pipeline, model = directory / hf_json.FILE_NAME, directory / spm.FILE_NAME
    if pipeline.is_file() and ((directory / "tokenizer_config.json").is_file() or not model.is_file()):
        return pipeline
    if model.is_file():
        return model
    parts = [directory / name for name in bpe_files.FILE_NAMES]
    return parts[0] if all(part.is_file() for part in parts) else None
