"""The vocabulary inside a GGUF file, rebuilt as a tokenizer of one of the two other kinds."""

from __future__ import annotations

import json
from enum import IntEnum
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Pipeline

from accessory.errors import TokenizerError, nearest
from accessory.tokenizer.base import Tokenizer
from accessory.tokenizer.gguf_metadata import read_metadata
from accessory.tokenizer.hf_json import JsonTokenizer
from accessory.tokenizer.special import SpecialTokens
from accessory.tokenizer.spm import SentencePieceTokenizer


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`; the numbers are those of sentencepiece."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# How each named pre-tokenizer cuts text before merging. `{digits}` is all that tells Llama 3 and Qwen 2 apart.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(_SPLIT.format(digits=digits)), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _llama3() -> pre_tokenizers.PreTokenizer:
    return _split("{1,3}")


def _qwen2() -> pre_tokenizers.PreTokenizer:
    return _split("")


_PRE_TOKENIZERS = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
    "qwen2": _qwen2,
}
_LLAMA3 = {"llama-bpe", "llama3", "llama-v3"}


def open_gguf(path: Path) -> Tokenizer:
    """Read the tokenizer of a `.gguf` file.

    `tokenizer.ggml.model` "gpt2" becomes a byte-level BPE pipeline, "llama" a sentencepiece model; both save as such.
    Raises TokenizerError for a file that is not GGUF, has no vocabulary, or names a kind that is not known here.
    """
    values = read_metadata(path)
    kind = values.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(values, str(path))
    if kind == "llama":
        return _sentencepiece(values, str(path))
    found = "no tokenizer" if kind is None else f"a tokenizer of kind {kind!r}"
    raise TokenizerError(
        f"{path}: found {found}; expected tokenizer.ggml.model 'gpt2' or 'llama'. Give --tokenizer_path another file: "
        "a tokenizer.model, or a tokenizer.json with its tokenizer_config.json."
    )


def _byte_level(values: dict[str, object], source: str) -> JsonTokenizer:
    tokens, types = _tokens_and_types(values, source)
    pre = values.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise TokenizerError(
            f"{source}: tokenizer.ggml.pre is {pre!r}; expected one of {', '.join(sorted(_PRE_TOKENIZERS))}."
            f"{nearest(str(pre), _PRE_TOKENIZERS)} Give --tokenizer_path the model's tokenizer.json."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in _strings(values, "tokenizer.ggml.merges", source)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    _check_merges(merges, vocabulary, source)
    # Llama 3 takes a word that is a token whole, even where no chain of merges leads to it.
    pipeline = Pipeline(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _LLAMA3))
    if pre == "qwen2":
        pipeline.normalizer = normalizers.NFC()
    pipeline.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    pipeline.decoder = decoders.ByteLevel()
    pipeline.add_tokens(_added_tokens(tokens, types))
    special = _special_tokens(values, tokens, add_bos=pre in _LLAMA3, source=source)
    return JsonTokenizer(json.dumps(json.loads(pipeline.to_str()), ensure_ascii=False), special, source=source)


def _added_tokens(tokens: list[str], types: list[int]) -> list[AddedToken]:
    """Control tokens as special, user-defined ones as matched in text before anything else is cut."""
    added = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    return [
        AddedToken(token, special=added[kind], normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in added
    ]


def _sentencepiece(values: dict[str, object], source: str) -> SentencePieceTokenizer:
    tokens, types = _tokens_and_types(values, source)
    scores = values.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise TokenizerError(f"{source}: tokenizer.ggml.scores is missing or short; expected {len(tokens)} scores.")
    special = _special_tokens(values, tokens, add_bos=True, source=source)
    proto = ModelProto()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        proto.pieces.add(piece=token, score=score, type=kind)
    _describe_training(proto.trainer_spec, values, types)
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(values.get("tokenizer.ggml.add_space_prefix", True))
    normalizer.remove_extra_whitespaces = bool(values.get("tokenizer.ggml.remove_extra_whitespaces", False))
    normalizer.escape_whitespaces = True
    return SentencePieceTokenizer(proto.SerializeToString(deterministic=True), special, source=source)


def _describe_training(spec: TrainerSpec, values: dict[str, object], types: list[int]) -> None:
    """What sentencepiece asks of the training settings in order to encode."""
    spec.model_type = TrainerSpec.BPE
    spec.vocab_size = len(types)
    spec.byte_fallback = TokenType.BYTE in types
    spec.unk_id = types.index(TokenType.UNKNOWN) if TokenType.UNKNOWN in types else -1
    spec.bos_id = int(values.get("tokenizer.ggml.bos_token_id", -1))
    spec.eos_id = int(values.get("tokenizer.ggml.eos_token_id", -1))
    spec.pad_id = -1


def _tokens_and_types(values: dict[str, object], source: str) -> tuple[list[str], list[int]]:
    tokens = _strings(values, "tokenizer.ggml.tokens", source)
    types = values.get("tokenizer.ggml.token_type") or [int(TokenType.NORMAL)] * len(tokens)
    if len(set(tokens)) != len(tokens):
        raise TokenizerError(
            f"{source}: tokenizer.ggml.tokens lists a token twice; expected {len(tokens)} distinct ones."
        )
    if not isinstance(types, list) or len(types) != len(tokens) or not set(types) <= set(TokenType):
        raise TokenizerError(f"{source}: tokenizer.ggml.token_type does not fit; expected {len(tokens)} types, 1 to 6.")
    return tokens, types


def _strings(values: dict[str, object], key: str, source: str) -> list[str]:
    found = values.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(item, str) for item in found):
        raise TokenizerError(f"{source}: {key} is missing or empty; expected a list of texts.")
    return found


def _check_merges(merges: list[tuple[str, ...]], vocabulary: dict[str, int], source: str) -> None:
    """The library panics, rather than raises, over a merge whose parts or result are no tokens."""
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise TokenizerError(f"{source}: merge {' '.join(merge)!r} does not fit the tokens of this file.")


def _special_tokens(values: dict[str, object], tokens: list[str], *, add_bos: bool, source: str) -> SpecialTokens:
    """BOS and EOS by name; `add_bos` holds where the file does not say. The chat template is kept for saving."""
    names = {}
    for name in ("bos", "eos"):
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = values.get(key)
        if token_id is not None and not (isinstance(token_id, int) and 0 <= token_id < len(tokens)):
            raise TokenizerError(f"{source}: {key} is {token_id!r}; expected an id from 0 to {len(tokens) - 1}.")
        names[name] = None if token_id is None else tokens[token_id]
    template = values.get("tokenizer.chat_template")
    return SpecialTokens(
        **names,
        no_bos=names["bos"] is None,
        add_bos=bool(values.get("tokenizer.ggml.add_bos_token", add_bos)),
        config={"chat_template": template} if isinstance(template, str) else {},
    )
