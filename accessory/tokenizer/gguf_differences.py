"""How llama.cpp's tokenization will differ from training's, where a GGUF file cannot state what a tokenizer does."""

from __future__ import annotations

from accessory.errors import TokenizerError
from accessory.tokenizer.gguf_byte_fallback import is_byte_fallback, sentencepiece_beside, space_prefix
from accessory.tokenizer.gguf_fields import stop_names
from accessory.tokenizer.hf_json import JsonTokenizer
from accessory.tokenizer.pre_tokenization import pre_tokenization_name, steps
from accessory.tokenizer.spm import SentencePieceTokenizer

_TEKKEN = "cuts words otherwise at combining marks, and at capitals beyond A to Z"
_BEHIND_TOKENS = "puts a blank before text that follows a control or added token"


def differences(tokenizer: SentencePieceTokenizer | JsonTokenizer) -> list[str]:
    """The differences, each the rest of a sentence that begins with "llama.cpp"; empty where there are none."""
    found = _of_sentencepiece(tokenizer) if isinstance(tokenizer, SentencePieceTokenizer) else _of_json(tokenizer)
    blanks = [token.content for token in tokenizer.control_tokens().values() if token.lstrip or token.rstrip]
    if tokenizer.start_ids not in ((), (tokenizer.bos_id,)):
        found.append("puts nothing before a text, where documents begin with tokens of the family in training")
    if blanks:
        found.append(f"keeps blanks beside {', '.join(blanks[:4])}, where training drops them")
    left_out = tokenizer.stop_ids - set(stop_names(tokenizer).values())
    if left_out:
        found.append(f"does not end an answer at the ids {', '.join(map(str, sorted(left_out)))}")
    return found


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> list[str]:
    normalizer = tokenizer.proto.normalizer_spec
    user_defined = any(piece.type == piece.USER_DEFINED for piece in tokenizer.proto.pieces)
    found = {
        "does not normalize text": normalizer.precompiled_charsmap,
        "keeps all of several blanks in a row": normalizer.remove_extra_whitespaces,
        _BEHIND_TOKENS: normalizer.add_dummy_prefix and (user_defined or not tokenizer.legacy),
    }
    return [said for said, holds in found.items() if holds]


def _of_json(tokenizer: JsonTokenizer) -> list[str]:
    pipeline = tokenizer.pipeline()
    if not is_byte_fallback(pipeline):
        if {"type": "NFC"} in steps(pipeline.get("normalizer")):
            return ["does not compose characters (NFC) before it cuts a text"]
        return [_TEKKEN] if pre_tokenization_name(pipeline, ()) == "tekken" else []
    try:
        prefix, found = space_prefix(pipeline, tokenizer.source), []
    except TokenizerError:  # the tokenizer.model beside it is what was written
        return _of_sentencepiece(sentencepiece_beside(tokenizer))
    if prefix != "never" and steps(pipeline.get("pre_tokenizer")):  # Metaspace
        found.append("puts a blank before a text that begins with one, too")
    if prefix == "first":
        found.append(_BEHIND_TOKENS)
    return found
