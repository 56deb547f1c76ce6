"""vocab.json with merges.txt: the form in which OPT, and Qwen beside its tokenizer.json, publish a byte-level BPE."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tokenizers import pre_tokenizers

from accessory.errors import TokenizerError
from accessory.tokenizer.hf_json import JsonTokenizer
from accessory.tokenizer.pre_tokenization import PRE_TOKENIZATIONS, definition_of
from accessory.tokenizer.sniff import what_is
from accessory.tokenizer.special import Added, SpecialTokens, read_object

FILE_NAMES = ("vocab.json", "merges.txt")
_RULES_OF_CLASS = {"GPT2": "gpt-2", "GPTNeoX": "olmo", "Qwen2": "qwen2"}
_USUAL_END = "<|endoftext|>"


def open_bpe_files(directory: Path, special: SpecialTokens) -> JsonTokenizer:
    """Read a directory's vocab.json and merges.txt; `tokenizer_class` says how to split text, absent: as GPT-2.

    The result saves as tokenizer.json. Raises TokenizerError for files that do not fit each other or a class that is
    not known here.
    """
    vocabulary, path = read_object(directory / FILE_NAMES[0]), directory / FILE_NAMES[0]
    ids = list(vocabulary.values())
    if not ids or not all(type(token_id) is int and token_id >= 0 for token_id in ids) or len(set(ids)) < len(ids):
        raise TokenizerError(f"{path}: found {what_is(path)}; expected an object of tokens, each with its own id.")
    rules = PRE_TOKENIZATIONS[_rules_name(directory, special)]
    merges = directory / FILE_NAMES[1]
    pipeline = rules.pipeline(vocabulary, _merges(merges), str(merges))
    if special.config.get("add_prefix_space") and rules is PRE_TOKENIZATIONS[_RULES_OF_CLASS["GPT2"]]:
        pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return JsonTokenizer(definition_of(pipeline), _complete(special, vocabulary), source=str(path))


def _rules_name(directory: Path, special: SpecialTokens) -> str:
    stated = special.config.get("tokenizer_class")
    if stated is None:
        return _RULES_OF_CLASS["GPT2"]
    family = str(stated).removesuffix("Fast").removesuffix("Tokenizer")
    if family not in _RULES_OF_CLASS:
        known = ", ".join(f"{name}Tokenizer" for name in _RULES_OF_CLASS)
        raise TokenizerError(
            f"{directory / 'tokenizer_config.json'}: 'tokenizer_class' is {stated!r}; expected one of {known} beside a "
            f"{FILE_NAMES[0]}. Give --tokenizer_path the model's tokenizer.json."
        )
    return _RULES_OF_CLASS[family]


def _merges(path: Path) -> list[tuple[str, ...]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: found {what_is(path)}; expected merges, one a line.") from error
    begin = 1 if lines[0].startswith("#version") else 0
    return [tuple(line.rstrip("\r").split(" ")) for line in lines[begin:] if line.strip()]


def _complete(special: SpecialTokens, vocabulary: dict[str, int]) -> SpecialTokens:
    """Ids for the special tokens that come by name only: their own, or the next free one. EOS has a usual name."""
    listed = {token.content for token in special.added.values()}
    if special.eos is None and special.eos_id is None and _USUAL_END in listed | vocabulary.keys():
        special = replace(special, eos=_USUAL_END, named=(*special.named, _USUAL_END))
    added = dict(special.added)
    free = max([*vocabulary.values(), *added]) + 1
    for name in special.named:
        if name not in listed:
            token_id = vocabulary.get(name, free)
            added[token_id], free = Added(name), max(free, token_id + 1)
            listed.add(name)
    return replace(special, added=dict(sorted(added.items())))
