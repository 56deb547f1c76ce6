"""accessory/quantizer/strategy.py by hand."""

from __future__ import annotations

import pytest

from accessory.errors import ConfigError
from accessory.quant import MIXES
from accessory.quantizer.strategy import (
    NARROW,
    WIDE,
    Gain,
    choose,
    strategy_document,
    widths_of,
)


def test_most_gain_for_each_weight_first() -> None:
    """A small matrix of less gain may come before a large one; what finds no room is left out, the next may fit."""
    gains = {"a": Gain(10.0, 100), "b": Gain(6.0, 20), "c": Gain(3.0, 25), "d": Gain(7.0, 40)}
    assert choose(gains, 0.25) == {"a": NARROW, "b": WIDE, "c": WIDE, "d": NARROW}
    assert choose(gains, 0.12) == {"a": NARROW, "b": WIDE, "c": NARROW, "d": NARROW}
    assert set(choose(gains, 1.0).values()) == {WIDE}


def test_document() -> None:
    """GreenBit's schema and names."""
    found = strategy_document({"layers.3.attention.wq": WIDE, "layers.3.feed_forward.w2": NARROW})
    assert found == {
        "measurement": {
            "model.layers.3": {
                "q_proj": {"group_size": {"2": 64, "4": 128}, "bits": [4], "bits_prop": [1.0], "scale_bits": 4},
                "down_proj": {"group_size": {"2": 64, "4": 128}, "bits": [2], "bits_prop": [1.0], "scale_bits": 4},
            }
        }
    }


def test_names() -> None:
    assert widths_of("int3_g64") == (3, 64)
    assert all(widths_of(mix) is None for mix in MIXES)
    with pytest.raises(ConfigError, match="--quant_type 'nf4' cannot be calibrated; expected intB_gG"):
        widths_of("nf4")


@pytest.mark.parametrize(
    ("quant_type", "advice"),
    [
        ("nf4", "Leave out --calibrate."),
        ("mix2.7", "Did you mean 'mix2.5'?"),
        ("int2_g63", "Did you mean 'int2_g64'?"),
        (2, "mix2.2, mix2.5, mix3.0."),
    ],
)
def test_advice_for_a_name_that_cannot_be_calibrated(quant_type: object, advice: str) -> None:
    """To leave out --calibrate helps a format that is packed without it alone."""
    with pytest.raises(ConfigError) as error:
        widths_of(quant_type)
    assert str(error.value).endswith(advice)
