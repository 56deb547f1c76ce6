"""ROUGE and BLEU of answers against what was expected, for Chinese and for languages with spaces (extra `eval`)."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from accessory.data.readers import is_data, read_records
from accessory.errors import ConfigError, DataError, check_known
from accessory.eval.statistics import Figure, mean

LANGUAGES = ("auto", "zh", "en")
PREDICTION_KEYS = ("prediction", "predict", "prediction_text")
REFERENCE_KEYS = ("output", "reference", "target", "label", "answer")
RESAMPLES = 500
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_LETTERS = re.compile(r"\w")


class Pair(NamedTuple):
    """An answer and the expected one."""

    prediction: str
    reference: str


def read_pairs(path: Path) -> list[Pair]:
    """Those of a file, as tools/predict.py and qlora write it. Raises `DataError` naming what a record lacks."""
    if not is_data(path):
        raise DataError(f"{path}: is no file of records, such as predictions.jsonl.")
    pairs = []
    for record in read_records(path):
        found = [next((record.fields[key] for key in keys if isinstance(record.fields.get(key), str)), None)
                 for keys in (PREDICTION_KEYS, REFERENCE_KEYS)]  # fmt: skip
        if record.fault or None in found:
            said = record.fault or f"has the keys {sorted(record.fields)}"
            expected = " and ".join(f"a text in one of {', '.join(keys)}" for keys in (PREDICTION_KEYS, REFERENCE_KEYS))
            raise DataError(f"{path}:{record.line}: {said}; expected {expected}.")
        pairs.append(Pair(*found))
    if not pairs:
        raise DataError(f"{path}: holds no prediction.")
    return pairs


def text_figures(pairs: Sequence[Pair], language: str = "auto") -> dict[str, Figure]:
    """rouge-1, rouge-2 and rouge-l (F) and bleu-4, the means over documents, and bleu-4-corpus; from 0 to 100.

    zh: ROUGE over jieba's words, BLEU over characters. en: ROUGE over lower-case words. auto: by the references. Raises
    `ConfigError` for another language, and where the packages are not installed.
    """
    check_known("--language", language, LANGUAGES)
    if language == "auto":
        language = "zh" if _is_chinese("".join(pair.reference for pair in pairs)) else "en"
    try:
        rouge = list(_rouge_of_words(pairs) if language == "zh" else _rouge_of_english(pairs))
        return {
            **{
                name: mean([100 * row[place] for row in rouge])
                for place, name in enumerate(("rouge-1", "rouge-2", "rouge-l"))
            },
            **_bleu(pairs, "zh" if language == "zh" else "13a"),
        }
    except ImportError as error:
        raise ConfigError(f"ROUGE and BLEU need packages ({error}): pip install -e '.[eval]'.") from error


def _is_chinese(text: str) -> bool:
    return 2 * len(_CHINESE.findall(text)) > len(_LETTERS.findall(text))


def _rouge_of_words(pairs: Sequence[Pair]) -> Iterator[tuple[float, float, float]]:
    import jieba
    from rouge_chinese import Rouge

    jieba.setLogLevel(logging.WARNING)
    for pair in pairs:
        texts = [" ".join(jieba.cut(text)).strip() for text in pair]
        if not all(texts):  # an empty answer shares nothing
            yield 0.0, 0.0, 0.0
            continue
        (scores,) = Rouge().get_scores(*texts)
        yield tuple(scores[name]["f"] for name in ("rouge-1", "rouge-2", "rouge-l"))


def _rouge_of_english(pairs: Sequence[Pair]) -> Iterator[tuple[float, float, float]]:
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names)
    for pair in pairs:
        scores = scorer.score(pair.reference, pair.prediction)
        yield tuple(scores[name].fmeasure for name in names)


def _bleu(pairs: Sequence[Pair], tokenizer: str) -> dict[str, Figure]:
    """bleu-4: the mean over documents. bleu-4-corpus: of all n-grams together, its error by resampling documents."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=tokenizer, effective_order=True)
    each = [metric.sentence_score(pair.prediction, [pair.reference]) for pair in pairs]

    def corpus(chosen: Sequence[int]) -> float:
        """BLEU of the pairs of these numbers taken together."""
        counts, totals = ([sum(column) for column in zip(*(getattr(each[i], name) for i in chosen), strict=True)]
                          for name in ("counts", "totals"))  # fmt: skip
        lengths = [sum(getattr(each[i], name) for i in chosen) for name in ("sys_len", "ref_len")]
        return BLEU.compute_bleu(counts, totals, *lengths, smooth_method="exp").score

    everything, draw = range(len(each)), random.Random(0)
    drawn = [corpus(draw.choices(everything, k=len(each))) for _ in range(RESAMPLES)]
    middle = sum(drawn) / len(drawn)
    error = (sum((value - middle) ** 2 for value in drawn) / (len(drawn) - 1)) ** 0.5
    return {"bleu-4": mean([one.score for one in each]), "bleu-4-corpus": Figure(corpus(everything), error)}
