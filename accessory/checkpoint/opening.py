"""Finds out what a user gave as `--pretrained_path` and opens it."""

from __future__ import annotations

from pathlib import Path

from accessory.checkpoint.formats import gguf_file, hugging_face, llama2c, own, peft_adapter, qst, torch_shards
from accessory.checkpoint.run_checkpoints import checkpoints_in
from accessory.checkpoint.source import Source, present, read_json
from accessory.checkpoint.vision_part import is_vision_type, with_vision
from accessory.errors import CheckpointError, hub_hint, is_there
from accessory.tokenizer.sniff import what_is

KNOWN_FORMATS = (
    "a directory with model.safetensors and meta.json (Accessory), trainable.safetensors (Accessory, a trained part), "
    "config.json and *.safetensors or *.bin (Hugging Face), adapter_config.json (PEFT), consolidated.NN.pth (Meta), "
    "consolidated.NN-of-MM.model.pth (LLaMA2-Accessory), qst_*_parameters.pt (QST), a .gguf file, or a .bin file "
    "of llama2.c"
)
_PARTS = (".safetensors", ".pth", ".bin", ".json")


def open_source(path: str | Path, base: Source | None = None) -> Source:
    """Open one checkpoint directory or file.

    base: the one before it, which says what names and shapes of other software's trained parts mean. Raises
    `CheckpointError` saying what was found and what is known.
    """
    return with_vision(_open(Path(path), base))


def _open(path: Path, base: Source | None) -> Source:
    if not is_there(path):
        raise CheckpointError(f"{path}: no such checkpoint.{hub_hint(path)} Expected {KNOWN_FORMATS}.")
    if path.is_file():
        return _open_file(path)
    if opened := qst.open_qst(path, base):  # first: the published code leaves the base's own files beside these
        return opened
    if (path / peft_adapter.CONFIG_FILE).is_file():
        return peft_adapter.open_adapter(path, base)
    model_type = read_json(path / "config.json").get("model_type") if (path / "config.json").is_file() else None
    if is_vision_type(model_type):
        return hugging_face.open_encoder(path)
    if model_type is not None:
        return hugging_face.open_hugging_face(path)
    if opened := own.open_own(path):
        return opened
    if opened := torch_shards.open_shards(path):
        return opened
    if saved := checkpoints_in(path):
        names = ", ".join(checkpoint.name for checkpoint in saved)
        raise CheckpointError(f"{path}: is the output directory of a run; give a checkpoint in it: {names}.")
    raise CheckpointError(f"{path}: found {present(path)}. Expected {KNOWN_FORMATS}.")


def _open_file(path: Path) -> Source:
    if path.suffix == ".gguf":
        return gguf_file.open_gguf_file(path)
    if path.suffix == ".bin" and llama2c.is_llama2c(path):
        return llama2c.open_llama2c(path)
    part = " If it is part of a checkpoint, give the directory." if path.suffix in _PARTS else ""
    raise CheckpointError(f"{path}: found {what_is(path)}.{part} Expected {KNOWN_FORMATS}.")
