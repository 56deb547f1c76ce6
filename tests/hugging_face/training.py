"""The same training by transformers' Trainer and by our engine: documents, optimizer, recorded losses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor

from accessory.data.corpus import build_corpus
from accessory.data.order import GlobalOrder
from accessory.hugging_face import QSTForCausalLM
from accessory.tokenizer import open_tokenizer
from tests.conftest import DATA
from tests.hugging_face.loaded_models import batch

STEPS, ACCUMULATED, LR, CLIP = 3, 2, 3e-3, 1.0
LONGEST = 128  # tokens of a document


def documents(path: Path) -> Iterator[list[dict[str, Tensor]]]:
    """Of each step of that run its documents, with labels as transformers has them: the first never counts."""
    corpus = build_corpus(DATA, open_tokenizer(path), max_words=LONGEST)
    order = GlobalOrder(corpus, batch_size=2, accum_iter=ACCUMULATED, seed=0)
    for step in range(STEPS):
        rows = []
        for number in order.global_ids(0, step):
            tokens, following = (torch.from_numpy(part.astype("int64")) for part in corpus.document(number))
            rows.append({"input_ids": tokens, "labels": torch.cat([tokens[:1], following[:-1]])})
            assert following[-1] == -100
        yield rows


def collated(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A padded batch."""
    parts = batch([(row["input_ids"], row["labels"]) for row in rows])
    return dict(zip(("input_ids", "attention_mask", "labels"), parts, strict=True))


def optimizer_of(model: QSTForCausalLM) -> torch.optim.Optimizer:
    """The engine's."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, betas=(0.9, 0.95), weight_decay=0.0
    )


class Recording(transformers.Trainer):
    """Keeps each step's loss, unrounded, and takes documents in their order."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def training_step(self, *args, **kwargs) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss

    def _get_train_sampler(self, *args) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(model: QSTForCausalLM, path: Path, folder: Path, accumulated: int = ACCUMULATED, **how) -> Recording:
    """Trains on the documents of the engine's run."""
    rows = [row for step in documents(path) for row in step]
    arguments = transformers.TrainingArguments(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=accumulated, max_steps=STEPS, use_cpu=True,
        max_grad_norm=CLIP, save_steps=2, report_to=[], logging_steps=1, lr_scheduler_type="constant",
        disable_tqdm=True, dataloader_pin_memory=False, **how,
    )  # fmt: skip
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return Recording(
        model, arguments, data_collator=collated, train_dataset=rows, eval_dataset=rows[:3],
        optimizers=(optimizer, schedule), compute_metrics=lambda p: {"shape": list(p.predictions.shape)},
    )  # fmt: skip
