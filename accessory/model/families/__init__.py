"""The model types we know, by the name Hugging Face's config.json and ModelArgs' `architecture` give them."""

from __future__ import annotations

from accessory.errors import CheckpointError, nearest
from accessory.model.families import baichuan, bloom, glm, internlm, llama, neox, opt, qwen
from accessory.model.families.architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for module in (llama, qwen, baichuan, internlm, opt, bloom, neox, glm)
    for architecture in module.ARCHITECTURES
}
FAMILIES = tuple(dict.fromkeys(architecture.family for architecture in ARCHITECTURES.values()))
"""First parts of --llama_type."""


def architecture_of(name: object, source: str) -> Architecture:
    """The model type called `name` in `source`, a file or a flag. Raises `CheckpointError` listing those we know."""
    if not isinstance(name, str) or name not in ARCHITECTURES:
        # A file's model type is not misspelled: gpt_neo is another model than gpt_neox, and qwen than qwen2.
        hint = nearest(str(name), ARCHITECTURES) if source.startswith("--") else ""
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{source}: model_type {name!r} is not supported.{hint} Known: {known}.")
    return ARCHITECTURES[name]


def architecture_of_gguf(name: object, source: str) -> Architecture:
    """The model type behind GGUF's `general.architecture`. Raises `CheckpointError` listing those we know."""
    known = {a.gguf.architecture: a for a in reversed(ARCHITECTURES.values()) if a.gguf}
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(f"{source}: architecture {name!r} is not supported. Known: {', '.join(known)}.")
    return known[name]
