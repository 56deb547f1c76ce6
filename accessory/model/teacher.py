"""A frozen model that another one learns from: it is run on the same batch, without gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.data.batch import PackedBatch
from accessory.errors import ConfigError
from accessory.model.decoder import Decoder
from accessory.model.teaching import Teaching


@dataclass(eq=False)
class Teacher:
    """`decoder` teaches; it is no module of the student's, so that it is neither trained, sharded nor saved with it.

    vocabulary: tokens that student and teacher both have. weight, temperature: as in `Teaching`.
    """

    decoder: Decoder
    vocabulary: int
    weight: float
    temperature: float

    @torch.no_grad()
    def teach(self, batch: PackedBatch, entropy: Tensor | None = None) -> Teaching:
        """What it computes for a batch on its device; entropy: as in `Teaching`. A collective where it is cut.

        Raises `ConfigError` for a batch with insets, which are embeddings of the student.
        """
        if batch.insets:
            raise ConfigError("--teacher: a document has insets, embeddings that only the student understands.")
        hidden = self.decoder(batch.tokens, self.decoder.sequences(batch.lengths, shared=batch.shared))
        head = self.decoder.head_weight
        return Teaching(hidden, head, self.vocabulary, self.weight, self.temperature, entropy)
