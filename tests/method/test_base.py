"""What every method promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accessory.config import FinetuneConfig
from accessory.method import METHODS, Attachment, Method, presets
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.families import FAMILIES
from accessory.parallel.tensor import slicing_of
from accessory.quant import PackedWeight, storage
from tools.benchmark import train
from tools.plan import plan

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=2, hidden_dim=48, vocab_size=64)


def test_attachments_share_nothing() -> None:
    """Two fresh ones have their own sets."""
    one, two = Attachment(), Attachment()
    one.trainable.add("x")
    assert two.trainable == set()
    assert two.initial == {}


def test_a_method_must_attach() -> None:
    """The promise cannot be made empty-handed."""
    with pytest.raises(TypeError, match="attach"):
        Method(None)


@pytest.mark.parametrize("name", METHODS)
def test_no_setting_is_also_the_models(name: str) -> None:
    """A checkpoint's config.json holds both, and one would overwrite the other."""
    assert not METHODS[name].Settings.model_fields.keys() & ModelArgs.model_fields.keys()


def test_help_names_every_method_and_family() -> None:
    """Where a person reads them, they stand in words."""
    said = FinetuneConfig.model_fields["llama_type"].description
    assert all(name in said for name in [*FAMILIES, *(method.suffix for method in METHODS.values())])
    for command in (train, plan):
        (line,) = (line for line in command.__doc__.splitlines() if line.strip().startswith("method:"))
        assert all(name in line for name in presets())


def stored(name: str) -> type[PackedWeight] | None:
    """The storage that a method needs."""
    return METHODS[name](METHODS[name].Settings()).storage_of(storage("int2_g8")) if name == "qsft" else None


def attached(name: str, ranks: int = 1) -> tuple[dict[str, nn.Parameter], Attachment]:
    """A rank's parameters by name, of its share of a decoder with a method on it."""
    method = METHODS[name](METHODS[name].Settings())
    decoder = method.decoder(ARGS, dtype=torch.bfloat16, ranks=ranks, storage=stored(name))
    attachment = method.attach(decoder)
    return dict(decoder.named_parameters()), attachment


@pytest.mark.parametrize("name", METHODS)
def test_what_is_attached_exists_on_meta(name: str) -> None:
    """Whatever a method trains or adds is a parameter of the decoder, in fp32 and not yet in memory."""
    before = {own for own, _ in Decoder(ARGS, dtype=torch.bfloat16, storage=stored(name)).named_parameters()}
    parameters, attachment = attached(name)
    added = set(parameters) - before
    assert attachment.trainable
    assert attachment.trainable <= set(parameters)
    assert set(attachment.initial) == added
    for trained in attachment.trainable:
        assert parameters[trained].dtype == torch.float32
        assert parameters[trained].is_meta


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_initial_values_fit_the_parameters(name: str, ranks: int) -> None:
    """Whole fp32 tensors, whatever a rank has of them."""
    parameters, attachment = attached(name, ranks)
    for added, make in attachment.initial.items():
        value, own = make(torch.Generator()), parameters[added]
        assert value.dtype == torch.float32
        assert value.shape == slicing_of(own).whole_shape(tuple(own.shape), ranks)
