"""Finds out which kind of tokenizer lies at a path."""

from __future__ import annotations

from pathlib import Path

from accessory.errors import TokenizerError
from accessory.tokenizer import hf_json, spm
from accessory.tokenizer.base import Tokenizer
from accessory.tokenizer.gguf_vocab import open_gguf
from accessory.tokenizer.hf_json import open_json
from accessory.tokenizer.sniff import what_is
from accessory.tokenizer.special import read_special_tokens
from accessory.tokenizer.spm import open_sentencepiece

_EXPECTED = "expected a .model (sentencepiece), .json (tokenizers) or .gguf file, or a directory that holds one"


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`: a `.model`, `.json` or `.gguf` file, or a directory with tokenizer.model or .json.

    BOS, EOS and whether a document starts with BOS are taken from tokenizer_config.json, special_tokens_map.json,
    generation_config.json and config.json of the same directory where they say so. A directory that holds both kinds
    is read from tokenizer.json if tokenizer_config.json lies beside it.
    Raises TokenizerError naming the file, what was found there and what was expected.
    """
    path = Path(path)
    file = _choose(path) if path.is_dir() else path
    if not file.is_file():
        raise TokenizerError(f"{file}: found {what_is(file)}; {_EXPECTED}.")
    if file.suffix == ".gguf":
        return open_gguf(file)
    if file.suffix == ".json":
        return open_json(file, read_special_tokens(file.parent))
    if file.suffix == ".model":
        return open_sentencepiece(file, read_special_tokens(file.parent))
    raise TokenizerError(f"{file}: found {what_is(file)} named {file.suffix or 'without suffix'!r}; {_EXPECTED}.")


def _choose(directory: Path) -> Path:
    pipeline, model = directory / hf_json.FILE_NAME, directory / spm.FILE_NAME
    if pipeline.is_file() and ((directory / "tokenizer_config.json").is_file() or not model.is_file()):
        return pipeline
    if model.is_file():
        return model
    vocabularies = sorted(directory.glob("*.gguf"))
    if len(vocabularies) == 1:
        return vocabularies[0]
    if vocabularies:
        names = ", ".join(file.name for file in vocabularies)
        raise TokenizerError(f"{directory}: found several .gguf files ({names}); expected the path of one of them.")
    raise TokenizerError(f"{directory}: found neither {hf_json.FILE_NAME} nor {spm.FILE_NAME}; {_EXPECTED}.")
