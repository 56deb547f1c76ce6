"""Perplexity in GPTQ's protocol, by which low-bit models are compared: windows of a text, one after the other."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from accessory.data.batch import IGNORE, Document, PackedBatch
from accessory.errors import DataError
from accessory.eval.ranks import over_ranks
from accessory.kernels.single_precision import by_onednn
from accessory.meta import MetaModel


class Perplexity(NamedTuple):
    """exp of the mean of -log p over windows, how far a window's mean carries over to it (stderr), and of how many."""

    perplexity: float
    stderr: float
    windows: int
    tokens: int


def perplexity(model: MetaModel, text: str, seq: int = 2048, windows: int | None = None) -> Perplexity:
    """Of a text that is tokenized once, from its start, and cut into windows of `seq` tokens; the rest is dropped.

    Each window is read by itself, and its tokens but the first are predicted, `seq` - 1 of them. windows: the first so
    many; all when absent. stderr: of the mean over windows, times the perplexity; nan of one window. Raises `DataError`
    for a text that is shorter than a window, and for a window that the model cannot read.
    """
    if not 2 <= seq <= model.max_seq_len:
        raise DataError(f"A window of {seq} tokens cannot be read; expected 2 to {model.max_seq_len} (--max_seq_len).")
    ids = np.array([*model.tokenizer.start_ids, *model.tokenizer.encode(text)], np.int64)
    found = len(ids) // seq
    if not found or (windows or 0) > found:
        raise DataError(f"The text has {len(ids)} tokens, {found} windows of {seq}; expected {windows or 1} or more.")
    parts = list(ids[: (windows or found) * seq].reshape(-1, seq))
    means = torch.tensor(over_ranks(parts, lambda part: _mean_loss(model, part)), dtype=torch.float64)
    value = math.exp(means.mean())
    deviation = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return Perplexity(value, value * deviation, len(parts), len(parts) * (seq - 1))


def _mean_loss(model: MetaModel, ids: np.ndarray) -> float:
    batch = PackedBatch.pack([Document(ids, np.append(ids[1:], IGNORE), 0)], share=False)
    with by_onednn():
        return -model.token_scores(batch.to(model.llma.frequencies.device)).log_p.double().mean().item()
