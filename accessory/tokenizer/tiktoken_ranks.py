"""Llama 3's tokenizer.model as Meta publishes it: a byte-level BPE in tiktoken's form, lines of base64 and rank."""

from __future__ import annotations

import base64
import binascii
from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken, pre_tokenizers

from accessory.errors import TokenizerError
from accessory.tokenizer.hf_json import JsonTokenizer
from accessory.tokenizer.pre_tokenization import PRE_TOKENIZATIONS, definition_of
from accessory.tokenizer.sniff import what_is
from accessory.tokenizer.special import SpecialTokens

_RULES = PRE_TOKENIZATIONS["llama-bpe"]
_BEGIN, _END, _ENDS_OF_TURNS = "<|begin_of_text|>", "<|end_of_text|>", ("<|eom_id|>", "<|eot_id|>")
_SPECIAL = 256  # tokens behind the ranks, most of them reserved
_NAMED = {
    0: _BEGIN, 1: _END, 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>",
    8: _ENDS_OF_TURNS[0], 9: _ENDS_OF_TURNS[1], 10: "<|python_tag|>",
}  # fmt: skip
"""Where Llama 3.1 to 3.3 name them; Llama 3.0 has the same but for 4, 8 and 10, which it does not use."""
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_HIDDEN = filter(lambda letter: ord(letter) > 255, _ALPHABET)
_LETTERS = [chr(byte) if chr(byte) in _ALPHABET else next(_HIDDEN) for byte in range(256)]
"""The letter that stands for each byte in byte-level vocabularies: its own if visible, else the next free."""
_EXPECTED = "expected lines of base64 and rank, as tiktoken reads them"


def open_tiktoken(path: Path, special: SpecialTokens) -> JsonTokenizer:
    """Read Llama 3's tokenizer.model; special tokens and the BOS before a document are Meta's where no file says else.

    It saves as tokenizer.json, with the .model beside it. Raises TokenizerError for a damaged file, and for ranks that
    were learned on text cut in another way (Llama 4's), since the file does not say how to cut.
    """
    content = path.read_bytes()
    ranks = _ranks(content, path)
    vocabulary = {_spell(token): rank for token, rank in ranks.items()}
    pipeline = _RULES.pipeline(vocabulary, _merges(ranks))
    _check_pre_tokenization(ranks, path)
    reserved = iter(range(_SPECIAL))
    names = [_NAMED.get(place) or f"<|reserved_special_token_{next(reserved)}|>" for place in range(_SPECIAL)]
    pipeline.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    ends = [len(ranks) + names.index(name) for name in (_END, *_ENDS_OF_TURNS)]
    special = replace(
        special,
        bos=special.bos or (None if special.no_bos else _BEGIN),
        eos=special.eos or (_END if special.eos_id is None else None),
        add_bos=special.add_bos if special.add_bos is not None else _RULES.add_bos,
        stop_ids=special.stop_ids or tuple(ends),
    )
    return JsonTokenizer(definition_of(pipeline), special, source=str(path), model_file=content)


def _ranks(content: bytes, path: Path) -> dict[bytes, int]:
    """The tokens by rank, which is their id, in order. All 256 bytes are among them."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (binascii.Error, ValueError) as error:
            raise TokenizerError(f"{path}, line {number}: found {line[:80]!r}; {_EXPECTED}.") from error
    whole = sorted(ranks.values()) == list(range(len(content.splitlines())))
    if not whole or not {bytes([byte]) for byte in range(256)} <= ranks.keys():
        raise TokenizerError(
            f"{path}: found {what_is(path)} with {len(ranks)} tokens; {_EXPECTED}, each token and rank once, all 256 "
            "bytes among them."
        )
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """Every way to put a token together of two, by rank: tiktoken joins whatever pair gives the lowest."""
    return [
        (_spell(token[:cut]), _spell(token[cut:]))
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]


def _spell(token: bytes) -> str:
    return "".join(map(_LETTERS.__getitem__, token))


def _check_pre_tokenization(ranks: dict[bytes, int], path: Path) -> None:
    """Raise TokenizerError for a token that Llama 3 would split: the ranks were learned on text split otherwise."""
    cut = _RULES.pre_tokenizer()
    for token in ranks:
        try:
            text = token.decode()
        except UnicodeDecodeError:  # a part of a letter
            continue
        if len(cut.pre_tokenize_str(text)) > 1:
            raise TokenizerError(
                f"{path}: has the token {text!r}, which Llama 3 would cut in two; expected the tokenizer.model of a "
                "Llama 3. Give --tokenizer_path the model's tokenizer.json."
            )
