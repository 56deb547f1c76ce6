"""Settings of side tuning under the names of the published code."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from accessory.errors import ConfigError, explain_validation
from accessory.method.side_settings import SideSettings
from accessory.method.side_tuning import SideTuning


class QSTConfig(SideSettings):
    """`SideSettings` by keyword, where `activation` is the adapter's, as the published code calls it.

    Raises `ConfigError` naming a key that is unknown or has a wrong value.
    """

    def __init__(self, **keys: Any) -> None:
        # `alpha_r` is one of the keys by which settings are known to be published ones.
        keys = SideTuning.translated({"alpha_r": None, **keys})
        try:
            super().__init__(**keys)
        except ValidationError as error:
            known = {*SideSettings.model_fields, "activation"}
            raise ConfigError(explain_validation(error, "QSTConfig", known)) from error
