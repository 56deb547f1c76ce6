"""How byte-level vocabularies split text into words before merging, by the names that GGUF files give this."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Pipeline

from accessory.errors import TokenizerError

# `{digits}` is all that tells Llama 3 and Qwen 2 apart.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3, _QWEN_2 = (_WORDS.format(digits="{1,3}"),), (_WORDS.format(digits=""),)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_BLOOM = (r" ?[^(\s|[.,!?…。，、।۔،])]+",)  # its brackets nest, as the library's regular expressions allow
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")
_UNNAMED = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")  # as llama.cpp if a file gives no name


@dataclass(frozen=True)
class PreTokenization:
    """How text is split, whether characters are composed first (NFC), and what else goes with the name.

    patterns: regular expressions of the words; none: GPT-2's. single_digits: whether each digit is a word.
    ignore_merges: a word that is a token is taken whole, even where no chain of merges leads to it.
    add_bos: whether a document starts with BOS where a file does not say.
    start_tokens: names of the tokens that start a document whatever a file says of BOS.
    """

    patterns: tuple[str, ...] = ()
    single_digits: bool = False
    composes: bool = False
    ignore_merges: bool = False
    add_bos: bool = False
    start_tokens: tuple[str, ...] = ()

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """The step of a pipeline that splits text so."""
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        steps += [pre_tokenizers.Digits(individual_digits=True)] if self.single_digits else []
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.patterns)
        return pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level

    def pipeline(
        self, vocabulary: dict[str, int], merges: list[tuple[str, ...]], source: str | None = None
    ) -> Pipeline:
        """A pipeline without added tokens; raises TokenizerError for a merge in the file `source` that does not fit.

        The library panics, rather than raises, over a merge whose parts or result are no tokens.
        """
        for merge in merges if source else ():
            if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
                raise TokenizerError(f"{source}: merge {' '.join(merge)!r} does not fit the tokens of the vocabulary.")
        pipeline = Pipeline(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=self.ignore_merges))
        if self.composes:
            pipeline.normalizer = normalizers.NFC()
        pipeline.pre_tokenizer, pipeline.decoder = self.pre_tokenizer(), decoders.ByteLevel()
        return pipeline


def definition_of(pipeline: Pipeline) -> str:
    """The text of its tokenizer.json, letters as they are, whatever version of the library writes it."""
    return json.dumps(json.loads(pipeline.to_str()), ensure_ascii=False)


_NAMES: dict[PreTokenization, tuple[str, ...]] = {
    PreTokenization(): (
        "gpt-2", "phi-2", "mpt", "jais", "trillion", "gigachat", "a.x-4.0", "mellum", "exaone4", "granite-docling",
    ),
    PreTokenization(composes=True): ("olmo",),  # the tokenizer of GPT-NeoX
    PreTokenization(single_digits=True): (
        "smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2",
    ),
    PreTokenization(_LLAMA_3, ignore_merges=True, add_bos=True): (
        "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "midm-2.0", "lfm2",
    ),
    PreTokenization(_LLAMA_3): ("dbrx", "smaug-bpe"),
    PreTokenization(_LLAMA_3, start_tokens=("[gMASK]", "<sop>")): ("glm4", "chatglm-bpe"),
    PreTokenization(_QWEN_2, composes=True): ("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"),
    PreTokenization(_QWEN_2): ("stablelm2", "hunyuan", "solar-open", "grok-2"),
    PreTokenization(_TEKKEN, ignore_merges=True, add_bos=True): ("tekken",),
    PreTokenization(_DEEPSEEK_CODER, single_digits=True): ("deepseek-coder",),
    PreTokenization(_BLOOM): ("bloom", "poro-chat", "gpt3-finnish"),
    PreTokenization(_UNNAMED): ("default",),
}  # fmt: skip
PRE_TOKENIZATIONS = {name: rules for rules, names in _NAMES.items() for name in names}
"""`tokenizer.ggml.pre` -> what it stands for. Of several names for one, the first is the one to write."""
WRITTEN = tuple(names[0] for names in _NAMES.values() if names[0] != "default")
"""The names that are written, one for each pre-tokenization."""


def pre_tokenization_name(pipeline: dict, start_tokens: tuple[str, ...]) -> str | None:
    """The name of the pre-tokenization of a tokenizer.json (parsed); None if it has none.

    `start_tokens` are the names of the tokens that start a document, which differ between GLM and Llama 3.
    """
    asked = _essence(pipeline)
    made = {name: json.loads(rules.pipeline({}, []).to_str()) for name, rules in PRE_TOKENIZATIONS.items()}
    alike = {name: PRE_TOKENIZATIONS[name] for name, pipeline in made.items() if _essence(pipeline) == asked}
    ignored = bool(pipeline["model"].get("ignore_merges"))
    alike = {name: rules for name, rules in alike.items() if rules.start_tokens in ((), start_tokens)}
    # GLM's own first, since only documents that start with its tokens get so far.
    for name, rules in sorted(alike.items(), key=lambda item: not item[1].start_tokens):
        if rules.ignore_merges == ignored or _merges_lead_everywhere(pipeline):
            return name
    return None


def merges_of(model: dict) -> list[tuple[str, ...]]:
    """The merges of a BPE model of a tokenizer.json, which writes them as texts or as pairs."""
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]


def _essence(pipeline: dict) -> list:
    """The steps of a tokenizer.json before merging, in one form whatever its spelling."""
    return [steps(pipeline.get("normalizer")), steps(pipeline.get("pre_tokenizer"))]


def _merges_lead_everywhere(pipeline: dict) -> bool:
    """Whether merging gives every token that a text may hold, so that taking it whole makes no difference."""
    model = pipeline["model"]
    merging = models.BPE(vocab=model["vocab"], merges=merges_of(model))
    tokens = model["vocab"].keys() - {token["content"] for token in pipeline.get("added_tokens") or ()}
    return all(len(merging.tokenize(token)) == 1 for token in tokens)


def steps(step: dict | None) -> list[dict]:
    """The steps in a row, without what has no influence on the ids."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step.get("normalizers") or step.get("pretokenizers") or [] for inner in steps(part)]
    silent = {"trim_offsets"} | ({"invert"} if not step.get("invert") else set())
    defaults = {"use_regex": True} if step["type"] == "ByteLevel" else {}
    return [{**defaults, **{key: value for key, value in step.items() if key not in silent}}]
