"""What a quantization is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from accessory.errors import ConfigError
from accessory.quantizer import distillation
from accessory.quantizer.reconstruction import Rates
from accessory.quantizer.strategy import widths_of

HELD = 8
"""Rows that nothing is fitted to: errors and perplexities are told of them."""


@dataclass(frozen=True)
class Settings:
    """How to quantize. quant_type: intB_gG, or a mix. rows, row_tokens: how much calibration text; own_rows: how much
    beside it that the base itself writes.

    batch: rows of an optimizer step. epochs: passes over the rows for each block; 0: GPTQ alone. distill_steps,
    distill_batch: steps of the last pass over the whole model, and rows of one; 0 steps: none. rates: of the blocks;
    distill_rate: the last pass's. whole_points: zeros are whole multiples of scales, as GPTQ's and AWQ's files have
    them: points are chosen by error feedback, and zeros follow the scales from then on.
    """

    quant_type: str
    rows: int = 96
    own_rows: int = 96
    row_tokens: int = 256
    batch: int = 2
    epochs: int = 1
    distill_steps: int = 48
    distill_batch: int = 8
    seed: int = 0
    rates: Rates = field(default_factory=Rates)
    distill_rate: float = distillation.RATE
    whole_points: bool = False

    def check(self, ranks: int) -> None:
        """Raise `ConfigError` for what cannot be, for so many ranks."""
        widths_of(self.quant_type)
        least = {"rows": 1, "row_tokens": 2, "batch": 1, "distill_batch": 1}
        for name in (*least, "own_rows", "epochs", "distill_steps"):
            value, smallest = getattr(self, name), least.get(name, 0)
            if not isinstance(value, int) or value < smallest:
                raise ConfigError(f"--{name} {value!r}: expected a whole number of at least {smallest}.")
        for name in ("batch", "distill_batch"):
            if getattr(self, name) > (rows := self.rows + self.own_rows):
                raise ConfigError(f"--{name} {getattr(self, name)}: there are {rows} rows (--rows, --own_rows).")
        for name in ("rows", "own_rows", "batch", "distill_batch"):
            if getattr(self, name) % ranks:
                raise ConfigError(f"--{name} {getattr(self, name)}: expected a multiple of the {ranks} processes.")
        if HELD % ranks:
            raise ConfigError(f"{ranks} processes: expected a divisor of {HELD}, the rows that are held out.")
