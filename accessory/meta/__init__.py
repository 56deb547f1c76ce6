"""MetaModel: tokenizer, decoder and loss in one, trained by the engine and asked by the demos."""

from __future__ import annotations

from accessory.meta.arguments import Paths, Settings
from accessory.meta.loading import Loaded
from accessory.meta.model import MetaModel, Score, load_for_inference
from accessory.meta.prompts import Prompt
from accessory.meta.sampling import Sampling

__all__ = ["Loaded", "MetaModel", "Paths", "Prompt", "Sampling", "Score", "Settings", "load_for_inference"]
