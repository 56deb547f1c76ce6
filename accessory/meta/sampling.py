"""How an answer is chosen."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from accessory.errors import ConfigError
from accessory.meta.arguments import checked, keyword_hint

_UPSTREAM_SAMPLING = {
    "images": ": a conversation is given one image, as Conversation(..., image=).",
    "image": ": a conversation is given one image, as Conversation(..., image=).",
    "return_logits": ": compute_logits(prompt)[-1] gives them.",
}
"""What LLaMA2-Accessory's `generate` and `stream_generate` take beside ours, and what to write instead."""


def _several(value: Any) -> Any:
    """One text where several may stand."""
    return (value,) if isinstance(value, str) else value


class Sampling(BaseModel):
    """How an answer is chosen: the keyword arguments of `MetaModel.generate` and `Conversation.ask`.

    max_gen_len: most tokens of it. temperature, top_k, top_p, min_p, repetition_penalty: as in `Choice`. stop: texts
    that end it, and are no part of it. seed: of the draws.
    """

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid", frozen=True)

    max_gen_len: int = Field(default=512, ge=0)
    temperature: float = Field(default=0.0, ge=0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_several)] = ()
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)

    @staticmethod
    def of(**values: Any) -> Sampling:
        """Those values; upstream's further arguments may be given unset. Raises `ConfigError` naming the ones that are
        unknown, of a wrong type or out of range.
        """
        known = Sampling.model_fields
        unset = {key for key in _UPSTREAM_SAMPLING & values.keys() if values[key] is None or values[key] is False}
        values = {key: value for key, value in values.items() if key not in unset}
        strange = [key for key in values if key not in known]
        hints = {key: _UPSTREAM_SAMPLING.get(key) or keyword_hint(key, known) for key in strange}
        if faults := [f"MetaModel: unknown key {key!r}{hint}" for key, hint in hints.items()]:
            raise ConfigError("\n".join(faults))
        return checked(Sampling, **values)
