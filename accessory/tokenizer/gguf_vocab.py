"""The vocabulary inside a GGUF file, rebuilt as a `JsonTokenizer` or a `SentencePieceTokenizer`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import AddedToken, processors

from accessory.errors import TokenizerError, nearest
from accessory.tokenizer.base import StatedTokenizer
from accessory.tokenizer.gguf_metadata import read_metadata
from accessory.tokenizer.hf_json import JsonTokenizer
from accessory.tokenizer.pre_tokenization import PRE_TOKENIZATIONS, definition_of
from accessory.tokenizer.special import Added, SpecialTokens
from accessory.tokenizer.spm import CHATGLM_CLASS, CHATGLM_START, SentencePieceTokenizer

TokenType = ModelProto.SentencePiece
"""`tokenizer.ggml.token_type` has sentencepiece's numbers: NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE."""


def open_gguf(path: Path) -> StatedTokenizer:
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
    if pre not in PRE_TOKENIZATIONS:
        raise TokenizerError(
            f"{source}: tokenizer.ggml.pre is {pre!r}; expected one of {', '.join(sorted(PRE_TOKENIZATIONS))}."
            f"{nearest(str(pre), PRE_TOKENIZATIONS)} Give --tokenizer_path the model's tokenizer.json."
        )
    rules = PRE_TOKENIZATIONS[pre]
    merges = [tuple(merge.split(" ", 1)) for merge in _strings(values, "tokenizer.ggml.merges", source)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pipeline = rules.pipeline(vocabulary, merges, source)
    # Control and unused tokens are special; text is cut at user-defined ones before anything else.
    special_kinds = {TokenType.CONTROL: True, TokenType.UNUSED: True, TokenType.USER_DEFINED: False}
    added = [(token, special_kinds[kind]) for token, kind in zip(tokens, types, strict=True) if kind in special_kinds]
    pipeline.add_tokens([AddedToken(token, special=is_special, normalized=False) for token, is_special in added])
    if rules.start_tokens and set(rules.start_tokens) <= vocabulary.keys():
        ids = [(name, vocabulary[name]) for name in rules.start_tokens]
        pipeline.post_processor = processors.TemplateProcessing(f"{' '.join(rules.start_tokens)} $A", None, ids)
    special = _special_tokens(values, tokens, add_bos=rules.add_bos, source=source)
    return JsonTokenizer(definition_of(pipeline), special, source=source)


def _sentencepiece(values: dict[str, object], source: str) -> SentencePieceTokenizer:
    tokens, types = _tokens_and_types(values, source)
    types = _with_one_unknown(values, tokens, types, source)
    scores = values.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise TokenizerError(f"{source}: tokenizer.ggml.scores is missing or short; expected {len(tokens)} scores.")
    special = _special_tokens(values, tokens, add_bos=True, source=source)
    controls = {token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL}
    if set(CHATGLM_START) <= controls:
        special.config["tokenizer_class"] = CHATGLM_CLASS
    # llama.cpp cuts text at user-defined tokens first, and treats each part as a text of its own.
    own = {index for index, kind in enumerate(types) if kind == TokenType.USER_DEFINED}
    special = replace(special, added={index: Added(tokens[index], special=False) for index in own})
    proto = ModelProto()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        proto.pieces.add(piece=token, score=score, type=kind)
    _describe_training(proto.trainer_spec, values, types)
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(values.get("tokenizer.ggml.add_space_prefix", True))
    normalizer.remove_extra_whitespaces = bool(values.get("tokenizer.ggml.remove_extra_whitespaces", False))
    normalizer.escape_whitespaces = True
    # An array of bytes, signed in some files.
    charsmap = values.get("tokenizer.ggml.precompiled_charsmap") or []
    normalizer.precompiled_charsmap = bytes(value & 0xFF for value in charsmap)
    return SentencePieceTokenizer(proto.SerializeToString(deterministic=True), special, source=source)


def _with_one_unknown(values: dict[str, object], tokens: list[str], types: list[int], source: str) -> list[int]:
    """Types with one unknown token, as sentencepiece needs; converters have called padding unknown, `<unk>` control."""
    unknown = _special_id(values, "unknown", len(tokens), source)
    if unknown is None:
        unknown = types.index(TokenType.UNKNOWN) if TokenType.UNKNOWN in types else 0
    others = [TokenType.UNUSED if kind == TokenType.UNKNOWN else kind for kind in types]
    return [*others[:unknown], TokenType.UNKNOWN, *others[unknown + 1 :]]


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
    types = values.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    if len(set(tokens)) != len(tokens):
        raise TokenizerError(
            f"{source}: tokenizer.ggml.tokens lists a token twice; expected {len(tokens)} distinct ones."
        )
    if not isinstance(types, list) or len(types) != len(tokens) or not set(types) <= set(TokenType.Type.values()):
        raise TokenizerError(f"{source}: tokenizer.ggml.token_type does not fit; expected {len(tokens)} types, 1 to 6.")
    return tokens, types


def _strings(values: dict[str, object], key: str, source: str) -> list[str]:
    found = values.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(item, str) for item in found):
        raise TokenizerError(f"{source}: {key} is missing or empty; expected a list of texts.")
    return found


def _special_tokens(values: dict[str, object], tokens: list[str], *, add_bos: bool, source: str) -> SpecialTokens:
    """BOS and EOS by name; `add_bos` counts if the file does not say. The chat template is kept for saving."""
    ids = {name: _special_id(values, name, len(tokens), source) for name in ("bos", "eos", "eot", "eom")}
    names = {name: None if ids[name] is None else tokens[ids[name]] for name in ("bos", "eos")}
    template = values.get("tokenizer.chat_template")
    return SpecialTokens(
        **names,
        no_bos=names["bos"] is None,
        add_bos=bool(values.get("tokenizer.ggml.add_bos_token", add_bos)),
        stop_ids=tuple(ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None),
        config={"chat_template": template} if isinstance(template, str) else {},
    )


def _special_id(values: dict[str, object], name: str, tokens: int, source: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = values.get(key)
    if token_id is not None and not (isinstance(token_id, int) and 0 <= token_id < tokens):
        raise TokenizerError(f"{source}: {key} is {token_id!r}; expected an id from 0 to {tokens - 1}.")
    return token_id
