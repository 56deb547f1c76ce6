"""How byte-level vocabularies cut text into words before merging, by the names GGUF files give the ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Pipeline

# `{digits}` is all that tells Llama 3 and Qwen 2 apart.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM_WORDS = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # its brackets nest, as the library's regular expressions allow


@dataclass(frozen=True)
class Cutting:
    """One way: the pre-tokenizer, whether characters are composed first (NFC), and what else goes with the name.

    ignore_merges: a word that is a token is taken whole, even where no chain of merges leads to it.
    add_bos: whether a document starts with BOS where a file does not say.
    opening: names of the tokens that open a document whatever a file says of BOS.
    """

    pre_tokenizer: Callable[[], pre_tokenizers.PreTokenizer]
    composes: bool = False
    ignore_merges: bool = False
    add_bos: bool = False
    opening: tuple[str, ...] = ()

    def pipeline(self, vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> Pipeline:
        """A pipeline without decoder and added tokens. Every merge must fit the vocabulary: the library would panic."""
        pipeline = Pipeline(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=self.ignore_merges))
        if self.composes:
            pipeline.normalizer = normalizers.NFC()
        pipeline.pre_tokenizer = self.pre_tokenizer()
        return pipeline


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _by_threes() -> pre_tokenizers.PreTokenizer:
    return _split(_WORDS.format(digits="{1,3}"))


def _by_ones() -> pre_tokenizers.PreTokenizer:
    return _split(_WORDS.format(digits=""))


def _bloom() -> pre_tokenizers.PreTokenizer:
    return _split(_BLOOM_WORDS)


_LLAMA3 = Cutting(_by_threes, ignore_merges=True, add_bos=True)
_GLM = Cutting(_by_threes, opening=("[gMASK]", "<sop>"))
CUTTINGS = {
    "gpt-2": Cutting(_gpt2),
    "default": Cutting(_gpt2),
    "smollm": Cutting(_single_digits),
    "starcoder": Cutting(_single_digits),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": Cutting(_by_ones, composes=True),
    "olmo": Cutting(_gpt2, composes=True),  # the tokenizer of GPT-NeoX
    "bloom": Cutting(_bloom),
    "glm4": _GLM,
    "chatglm-bpe": _GLM,
}
"""`tokenizer.ggml.pre` -> the way. Of several names for one way, the first is the one to write."""


def name_of_cutting(pipeline: dict, opening: tuple[str, ...]) -> str | None:
    """The name of the way in which a tokenizer.json (parsed) cuts text, None where it has none.

    `opening` are the names of the tokens that open a document, by which GLM is told from Llama 3.
    """
    asked = _essence(pipeline)
    alike = {
        name: way for name, way in CUTTINGS.items() if _essence(json.loads(way.pipeline({}, []).to_str())) == asked
    }
    ignored = bool(pipeline["model"].get("ignore_merges"))
    alike = {name: way for name, way in alike.items() if way.opening in ((), opening)}
    # GLM's own way first, which only documents opened as GLM's go by.
    for name, way in sorted(alike.items(), key=lambda item: not item[1].opening):
        if way.ignore_merges == ignored or _merges_lead_everywhere(pipeline):
            return name
    return None


def _essence(pipeline: dict) -> list:
    """What a tokenizer.json does to a text before it merges, whatever the words for it."""
    return [_steps(pipeline.get("normalizer")), _steps(pipeline.get("pre_tokenizer"))]


def _merges_lead_everywhere(pipeline: dict) -> bool:
    """Whether merging gives every token that a text may hold, so that taking it whole makes no difference."""
    model = pipeline["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    merging = models.BPE(vocab=model["vocab"], merges=merges)
    tokens = model["vocab"].keys() - {token["content"] for token in pipeline.get("added_tokens") or ()}
    return all(len(merging.tokenize(token)) == 1 for token in tokens)


def _steps(step: dict | None) -> list[dict]:
    """The steps in a row, without what has no influence on the ids."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step.get("normalizers") or step.get("pretokenizers") or [] for inner in _steps(part)]
    silent = {"trim_offsets"} | ({"invert"} if not step.get("invert") else set())
    defaults = {"use_regex": True} if step["type"] == "ByteLevel" else {}
    return [{**defaults, **{key: value for key, value in step.items() if key not in silent}}]
