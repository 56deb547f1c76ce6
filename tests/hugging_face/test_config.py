"""Settings of side tuning under the published names."""

from __future__ import annotations

import pytest

from accessory.errors import ConfigError
from accessory.hugging_face import QSTConfig


def test_settings_are_the_published_ones() -> None:
    """And ours; what is wrong is named."""
    theirs = QSTConfig(
        add_layer_norm_before_adapter=False, add_layer_norm_after_adapter=True, r=16, alpha_r=16, dropout=0.1,
        activation="swish", fan_in_fan_out=False, peft_hidden_size=16,
    )  # fmt: skip
    assert (theirs.r, theirs.dropout, theirs.adapter_activation) == (16, 0.1, "silu")
    assert QSTConfig(activation="gelu_new", start="released").adapter_activation == "gelu_tanh"
    with pytest.raises(
        ConfigError, match=r"QSTConfig: unknown key 'peft_hiden_size'\. Did you mean 'peft_hidden_size'"
    ):
        QSTConfig(peft_hiden_size=8)
    with pytest.raises(ConfigError, match="QSTConfig: 'r' is 0"):
        QSTConfig(r=0)
