"""Describes a checkpoint in words, for `tools/inspect_checkpoint.py`."""

from __future__ import annotations

from collections import Counter
from math import prod

from accessory.checkpoint.lazy import LazyTensor, PackedTensor
from accessory.checkpoint.source import Source
from accessory.model.args import ModelArgs
from accessory.model.families import ARCHITECTURES
from accessory.vision import VISIONS


def describe(source: Source, *, every_tensor: bool = False) -> str:
    """Lines of "name  value" on a source; with `every_tensor` one more for each tensor, by our names."""
    types = Counter(map(_type, source.tensors.values()))
    size = sum(file.stat().st_size for file in source.files)
    trained_on = (source.run or {}).get("quantization")
    lines = {
        "path": str(source.path),
        "format": source.format,
        "files": f"{len(source.files)} ({size / 1e9:.3f} GB)",
        "tensors": f"{len(source.tensors):,}",
        "parameters": f"{sum(prod(tensor.shape) for tensor in source.tensors.values()):,}",
        "types": ", ".join(f"{name} x {count}" for name, count in types.most_common()),
        "quantization": source.storage_names or (f"its base was trained on as {trained_on}" if trained_on else "none"),
    }
    if source.llama_type:
        lines["llama_type"] = source.llama_type
    keys = {kind.key for kind in VISIONS.values()}
    lines |= _settings({key: value for key, value in (source.settings or {}).items() if key not in keys})
    if source.vision:
        place = source.vision.place
        lines["images"] = f"{source.vision.name}: squares of {place.size} pixels become {place.rows} rows"
    if source.run:
        lines["trained on"] = ", ".join(f"{entry['path']} ({entry['format']})" for entry in source.run["base"])
    width = max(map(len, lines))
    text = [f"{name:<{width}}  {value}" for name, value in lines.items()]
    if every_tensor:
        text += [f"{name}  {_type(tensor)}  {list(tensor.shape)}" for name, tensor in source.tensors.items()]
    return "\n".join(text)


def _type(tensor: LazyTensor) -> str:
    return tensor.storage.name if isinstance(tensor, PackedTensor) else tensor.dtype


def _settings(settings: dict) -> dict[str, str]:
    """The settings worth a look, defaults left out."""
    known = {key: value for key, value in settings.items() if key in ModelArgs.model_fields}
    other = {key: value for key, value in settings.items() if key not in known}
    lines = {}
    if known:
        architecture = ARCHITECTURES.get(str(known.get("architecture", "llama")))
        lines["family"] = f"{architecture.family} ({architecture.name})" if architecture else str(known["architecture"])
    defaults = {name: field.default for name, field in ModelArgs.model_fields.items()}
    shown = {key: value for key, value in known.items() if key != "architecture" and value != defaults[key]}
    if shown:
        lines["settings"] = ", ".join(f"{key} {value}" for key, value in shown.items())
    if other:
        lines["method"] = ", ".join(f"{key} {value}" for key, value in other.items())
    return lines
