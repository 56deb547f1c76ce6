"""Models without weights: their settings, by the name of a size or from a settings file."""

from __future__ import annotations

from pathlib import Path

from accessory.checkpoint.source import read_json, settings_read_by
from accessory.errors import ConfigError
from accessory.method import setting_names
from accessory.model.args import ModelArgs
from accessory.model.families import architecture_of
from accessory.vision import VISIONS

LLAMA_2 = {
    "7B": {"dim": 4096, "n_layers": 32, "n_heads": 32},
    "13B": {"dim": 5120, "n_layers": 40, "n_heads": 40},
    "70B": {
        "dim": 8192,
        "n_layers": 80,
        "n_heads": 64,
        "n_kv_heads": 8,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
    },
}
SIZES = {
    **LLAMA_2,
    "1.1B": {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "hidden_dim": 5632},
    "135M": {
        "dim": 576,
        "n_layers": 30,
        "n_heads": 9,
        "n_kv_heads": 3,
        "hidden_dim": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tiny": {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 256, "vocab_size": 512},
}
"""LLaMA-2's; the shapes of TinyLlama and SmolLM2-135M, to try things with; and one that takes no time at all."""


def is_shape(model: str) -> bool:
    """Whether `model` says what a model looks like, instead of where its weights are."""
    return model in SIZES or model.endswith(".json")


def args_of(model: str) -> ModelArgs:
    """Settings of one of `SIZES`, or in a params.json or config.json, or in a directory with one.

    Raises `ConfigError` for what is none of these, `CheckpointError` for a file whose settings make no model.
    """
    if model in SIZES:
        return ModelArgs(**{"vocab_size": 32000} | SIZES[model])
    path = Path(model)
    files = [path / "config.json", path / "params.json"] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ConfigError(
            f"{model!r} is none of {', '.join(SIZES)}, no params.json or config.json, and no directory with one."
        )
    settings = read_json(file)
    if "model_type" in settings:
        architecture = architecture_of(settings["model_type"], str(file))
        return settings_read_by(lambda: architecture.read(settings, str(file)), file)
    others = setting_names() | {vision.key for vision in VISIONS.values()}  # our own files hold these settings, too
    stated = {key: value for key, value in settings.items() if value != -1 and key not in others}
    return settings_read_by(lambda: ModelArgs(**{"vocab_size": 32000} | stated), file)
