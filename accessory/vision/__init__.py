"""Image encoders: what turns pictures into rows of embeddings that are laid into a packed batch. One class each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accessory.errors import CheckpointError
from accessory.vision.base import Vision
from accessory.vision.clip import Clip
from accessory.vision.qformer import QFormer

VISIONS: dict[str, type[Vision]] = {vision.name: vision for vision in (QFormer, Clip)}
"""Name -> class. `--llama_type` names the Q-Former (`llama_qformerv2`); CLIP is what types without a name have."""


def vision_of_directory(config: Mapping[str, Any], source: str) -> Vision:
    """The encoder that a Hugging Face directory's config.json describes; `source` names that file.

    Raises `CheckpointError` for another kind of model, and for settings that cannot be computed with.
    """
    kind = config.get("model_type")
    found = next((vision for vision in VISIONS.values() if kind in vision.model_types), None)
    if found is None:
        known = ", ".join(name for vision in VISIONS.values() for name in vision.model_types)
        raise CheckpointError(f"{source}: model_type is {kind!r}; expected an image encoder's: {known}.")
    return found.of_directory(config, source)


__all__ = ["VISIONS", "Clip", "QFormer", "Vision", "vision_of_directory"]
