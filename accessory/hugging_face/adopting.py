"""Makes a side-tuned decoder of a transformers model, whose weights it uses where they lie.

A matrix that bitsandbytes packed stays the bytes it is. Only what the decoder keeps in another type or order is copied:
norms in fp32, and the matrices that BLOOM and NeoX files hold in one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from accessory.blueprint import DTYPES, keep_packed, packed_linears, plain_linears
from accessory.checkpoint.formats.hugging_face import read_config, source_of
from accessory.checkpoint.lazy import HeldTensor
from accessory.checkpoint.load import fill, resolve
from accessory.checkpoint.source import Source, model_args_of
from accessory.errors import CheckpointError, ConfigError
from accessory.method import Attachment
from accessory.method.side_network import SideDecoder
from accessory.method.side_settings import SideSettings
from accessory.method.side_tuning import SideTuning
from accessory.parallel import groups
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.quant import storage


class TheirConfig(Protocol):
    """What is used of transformers' `PreTrainedConfig`."""

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""


def open_model(model: torch.nn.Module, config: TheirConfig) -> Source:
    """A model that transformers loaded, as an opened checkpoint; `config` may be another object than `model.config`.

    Raises `CheckpointError` for a model type that is not known, naming it, and for a quantization other than 4-bit
    bitsandbytes.
    """
    stated = config.to_dict()
    where = Path(f"{type(model).__name__} {stated.get('_name_or_path', '')}".strip())
    described = read_config(stated, where)
    stated["quantization_config"] = quantization = _quantization(model)
    if quantization and quantization.get("quant_method") != "bitsandbytes":
        raise CheckpointError(  # kernels of others lay out what they loaded anew
            f"{where}: was packed by {quantization.get('quant_method')!r}; expected 4-bit bitsandbytes. Give its "
            "directory to MetaModel.from_pretrained instead."
        )
    theirs = {name: HeldTensor(tensor) for name, tensor in model.state_dict().items()}
    source = source_of(where, stated, described, theirs, [])
    if embedding := source.tensors.get("tok_embeddings.weight"):
        source.settings["vocab_size"] = embedding.shape[0]  # tokens may have been added since `config` was read
    return source


def adopt(
    model: torch.nn.Module, source: Source, settings: SideSettings, dtype: torch.dtype | None, seed: int
) -> tuple[SideDecoder, Attachment]:
    """The decoder of `source`, which is `open_model` of `model`, with a side network that starts as `seed` says.

    dtype: as `compute_dtype`. Raises `AccessoryError` where model and settings do not go together.
    """
    args = model_args_of(source)
    method = SideTuning(settings).beside(args)
    layout = Layout(device=groups.start(str(_device(model))).device)  # each process has the whole model
    method.check(args, layout, "sdp")
    maker = storage(source.storage) if source.storage else None
    dtype = compute_dtype(model, dtype)
    decoder = method.decoder(args, dtype=dtype, storage=maker)
    for name in plain_linears([source]):
        decoder.get_submodule(name).keep_plain(dtype)
    keep_packed(decoder, packed_linears([source]), maker)
    attachment = method.attach(decoder)
    tensors = resolve(decoder, [source], attachment, initialize=True)
    fill(decoder, tensors, attachment, layout, DataParallel(layout, "sdp", False), seed, share=True)
    return decoder, attachment


def compute_dtype(model: torch.nn.Module, asked: torch.dtype | None) -> torch.dtype:
    """`asked`, or the type bitsandbytes was told to compute in, or the model's. Raises `ConfigError` for another."""
    stated = (_quantization(model) or {}).get("bnb_4bit_compute_dtype")
    dtype = asked or getattr(torch, str(stated).removeprefix("torch."), None) or _first_parameter(model).dtype
    if dtype not in DTYPES.values():
        known = ", ".join(dict.fromkeys(map(str, DTYPES.values())))
        raise ConfigError(f"dtype is {dtype}; expected one of {known}.")
    return dtype


def _quantization(model: torch.nn.Module) -> dict[str, Any] | None:
    stated = getattr(model.config, "quantization_config", None)
    return stated.to_dict() if hasattr(stated, "to_dict") else stated


def _first_parameter(model: torch.nn.Module) -> Tensor:
    return next(p for p in model.parameters() if p.is_floating_point())


def _device(model: torch.nn.Module) -> torch.device:
    found = sorted({str(tensor.device) for tensor in model.parameters()})
    if len(found) > 1 or found == ["meta"]:
        raise ConfigError(
            f"The model lies on {' and '.join(found)}; expected one device: load it with device_map={{'': 0}} or "
            "device_map={'': 'cpu'}."
        )
    return torch.device(found[0])
