"""Full fine-tuning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from accessory.checkpoint.load import fill, targets
from accessory.method import METHODS, Attachment
from accessory.method.full import Full
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.loss import cross_entropy_sum
from accessory.model.sequences import Sequences
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.parallel.tensor import slicing_of

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=64, qkv_bias=True)


def normal(shape: tuple[int, ...], deviation: float) -> Callable[[torch.Generator], Tensor]:
    """A maker of starting values: random, of a mean of zero."""
    return lambda generator: deviation * torch.randn(shape, generator=generator)


def attached(args: ModelArgs = ARGS) -> tuple[Decoder, Attachment]:
    """A bf16 decoder with the method on it."""
    decoder = Decoder(args, dtype=torch.bfloat16)
    return decoder, Full(Full.Settings()).attach(decoder)


def test_everything_is_trained_in_fp32() -> None:
    """Every parameter is an fp32 master; the compute dtype stays; nothing is added."""
    decoder, attachment = attached()
    assert attachment.trainable == {name for name, _ in decoder.named_parameters()}
    assert attachment.initial == {}
    assert {p.dtype for p in decoder.parameters()} == {torch.float32}
    assert decoder.dtype == torch.bfloat16
    assert METHODS["full"] is Full
    assert Full.trains_base


def test_slicing_survives() -> None:
    """Going to fp32 does not forget how a parameter is cut."""
    plain, (decoder, _) = Decoder(ARGS, dtype=torch.bfloat16), attached()
    slicings = {name: slicing_of(p) for name, p in decoder.named_parameters()}
    assert slicings == {name: slicing_of(p) for name, p in plain.named_parameters()}
    assert slicings["layers.0.attention.wo.weight"].dim == 1


@pytest.mark.parametrize("tied", [False, True])
def test_bf16_gradients_are_close_to_fp32s(layout: Layout, tied: bool) -> None:
    """Every parameter gets an fp32 gradient, within 3 % of the same model's computed in fp32."""
    args = ARGS.model_copy(update={"tie_word_embeddings": tied})
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        decoder = Decoder(args, dtype=dtype)
        trainable = Full(Full.Settings()).attach(decoder).trainable
        initial = {target.name: normal(target.whole_shape(1), 0.2) for target in targets(decoder)}
        fill(decoder, {}, Attachment(trainable, initial), layout, DataParallel(layout, "sdp", base_is_trained=True))
        ids = torch.randint(0, 64, (30,), generator=torch.Generator().manual_seed(0))
        hidden = decoder(ids, Sequences.build((13, 17), decoder.frequencies))
        assert hidden.dtype == dtype
        cross_entropy_sum(hidden, decoder.head_weight, ids.roll(-1)).backward()
        gradients.append({name: p.grad for name, p in decoder.named_parameters()})
    narrow, wide = gradients
    assert len(wide) == 27 - tied
    for name, exact in wide.items():
        assert narrow[name].dtype == torch.float32
        if name.endswith("wk.bias"):  # what all keys share leaves the softmax nearly unchanged: only rounding is left
            continue
        assert (narrow[name] - exact).norm() < 0.03 * exact.norm(), name


def test_no_settings() -> None:
    """A LoRA rank means nothing here."""
    with pytest.raises(ValidationError, match="lora_rank"):
        Full.Settings(lora_rank=8)
