"""Texts that tokenizers disagree over, any number of them."""

from __future__ import annotations

import random

_PIECES = [
    "Hello", " world", "the", " quick", "don't", "WE'LL", "they're", " I'm", "'S", "12", "3456", " 7", "1,234.50",
    "2024-01-31", " ", "  ", "   ", "        ", "\n", "\n\n", "\r\n", "\t", "\t\t", " \n", "\n ", ".", ",", "!", "?!",
    "...", " (", ")", "[", "]", "{", "}", "|", "/", "//", "\\", "'", '"', "`", "```", "#", "@", "$", "%", "^", "&", "*",
    "+", "=", "====", "<", ">", "_", "-", "—", "…", "naïve", "Übergröße", "日本語", "中文", "한국어", "русский",
    "ελληνικά", "العربية", "،", "۔", "हिन्दी", "ไทย", "🙂", "👩‍👩‍👧", "🇩🇪", "\u00a0", "\u200b", "\u3000", "。", "，",
    "½", "²", "Ⅷ", "٣", "def f(x):", "    return x", "</b>", "e\u0301", "ß", "\x07", "▁", "x\ty", "http://a.b/c?d=e&f",
    "a_b", "CamelCase", "\u2028", "\ufeff", "ﬁ",
]  # fmt: skip


def mixed_texts(count: int, seed: int = 0) -> list[str]:
    """One to nine pieces in a row each: words, figures, blanks, line ends, marks, scripts, code."""
    generator = random.Random(seed)
    return ["".join(generator.choices(_PIECES, k=generator.randint(1, 9))) for _ in range(count)]
