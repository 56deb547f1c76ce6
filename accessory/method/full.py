"""Full fine-tuning: every parameter is trained, kept as an fp32 master and cast where it is used."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from accessory.method.base import Attachment, Method
from accessory.model.decoder import Decoder


class Full(Method):
    """Trains everything; has no settings."""

    class Settings(BaseModel):
        """No keys of its own."""

        model_config = ConfigDict(extra="forbid")

    suffix: ClassVar[str] = ""
    also_called: ClassVar[tuple[str, ...]] = ("full",)
    summary: ClassVar[str] = "all weights"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"full": {}}
    trains_base: ClassVar[bool] = True
    merge_fault: ClassVar[str] = "the base itself was trained, nothing stands beside it"
    adapter_fault: ClassVar[str] = merge_fault

    @classmethod
    def storage_fault(cls, quant_type: str) -> str:
        """Codes have no gradient."""
        return f"{quant_type} weights cannot be trained"

    def attach(self, decoder: Decoder) -> Attachment:
        """Every parameter becomes trainable, in fp32."""
        decoder.float()
        return Attachment(trainable={name for name, _ in decoder.named_parameters()})
