"""What the models for transformers share: padded batches in, loss and logits out; state dicts of what is trained."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from accessory.errors import ConfigError, DataError
from accessory.generate import next_token_logits
from accessory.hugging_face.padding import PaddedRows
from accessory.model.decoder import Decoder
from accessory.model.loss import cross_entropy_sum


@dataclass
class CausalOutput:
    """What a forward gives: `loss`, an fp32 scalar or None, and `logits`, also by position or name.

    Logits are computed when they are asked for: training by the loss alone never holds them all.
    """

    loss: Tensor | None
    hidden: Tensor
    """The head's input [T, embedding_dim]."""
    rows: PaddedRows
    decoder: Decoder

    @cached_property
    def logits(self) -> Tensor:
        """fp32 [B, S, V], zero at padding."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            return self.rows.padded(next_token_logits(self.decoder, self.hidden))

    def __getitem__(self, key: int | slice | str) -> Any:
        """By name, or by position as in transformers' outputs: a loss that is None has none."""
        names = [name for name in ("loss", "logits") if name != "loss" or self.loss is not None]
        if isinstance(key, str) and key not in names:
            raise KeyError(key)
        chosen = key if isinstance(key, str) else names[key]
        return getattr(self, chosen) if isinstance(chosen, str) else tuple(getattr(self, name) for name in chosen)


class CausalForward:
    """Part of a module for transformers: its forward, and the types of its tensors."""

    accepts_loss_kwargs: ClassVar[bool] = True
    """Tells transformers' Trainer that `forward` takes `num_items_in_batch`."""

    _decoder: Decoder
    """What computes; a module states where it has it."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalOutput:
        """input_ids, attention_mask (0 at padding, on either side) and labels (-100: none) are int64 [B, S].

        labels are those of the tokens themselves, as in transformers: here they are shifted. The loss is the sum over
        supervised tokens divided by their number, or by `num_items_in_batch`, which Trainer counts over all
        micro-batches of a step. Raises `DataError` for a batch that cannot be.
        """
        decoder, rows = self._decoder, PaddedRows.of(input_ids, attention_mask)
        tokens, vocabulary = rows.packed(input_ids), decoder.args.vocab_size
        check_ids("input_ids", tokens, 0, vocabulary)
        following = None if labels is None else rows.next_labels(labels)
        with torch.autocast(decoder.frequencies.device.type, enabled=False):  # the decoder chooses its types itself
            sequences = decoder.sequences(rows.lengths)
            if following is None:
                return CausalOutput(None, decoder(tokens, sequences), rows, decoder)
            check_ids("labels", following, -100, vocabulary)
            learned, weights, places = decoder.learned(following, None, (following >= 0).nonzero()[:, 0])
            hidden = decoder(tokens, sequences.with_labelled(places))
            total = cross_entropy_sum(hidden, decoder.head_weight, learned, vocabulary, weights, rows=places)
        count = (following >= 0).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalOutput(total / count, hidden, rows, decoder)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As every module's, but types stay: packed bytes mean nothing in another, and what is trained is fp32.

        Raises `ConfigError` for an `fn` that changes them.
        """
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if (cast := fn(torch.empty(0, dtype=dtype)).dtype) != dtype:
                raise ConfigError(f"{type(self).__name__} cannot be cast to {cast}: give dtype= when it is made.")
        return super()._apply(fn, recurse)


def check_ids(name: str, ids: Tensor, least: int, vocabulary: int) -> None:
    """Raise `DataError` if int64 `ids`, given as the argument `name`, hold one outside `least` to `vocabulary` - 1."""
    low, high = (int(end) for end in ids.aminmax())
    if low < least or high >= vocabulary:
        found = low if low < least else high
        raise DataError(f"{name} holds {found}; expected {least} to {vocabulary - 1}, as the embedding has rows.")


def keep_only(module: nn.Module, names: Collection[str]) -> None:
    """Have the state dict of `module` hold the parameters `names` alone, and miss no others when it is loaded."""
    module.register_state_dict_post_hook(partial(_leave_out_others, frozenset(names)))
    module.register_load_state_dict_post_hook(partial(_miss_no_others, tuple(names)))


def _leave_out_others(kept: frozenset[str], _module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if name.startswith(prefix) and name.removeprefix(prefix) not in kept]:
        del state[name]


def _miss_no_others(kept: tuple[str, ...], _module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if key.endswith(kept)]
