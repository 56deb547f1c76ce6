"""The chain of few launches, its kernels written out, against the decoder's modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from accessory.checkpoint.load import fill, targets
from accessory.kernels.plain import decoding_attention, decoding_products
from accessory.method import METHODS, Attachment
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.decoding import decoding
from accessory.model.decoding_chain import Chain, why_not
from accessory.parallel.data import DataParallel
from accessory.quant import storage

ARGS = {"dim": 128, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 192, "vocab_size": 96}
LENGTHS = (5, 1, 9)


@pytest.fixture
def made(layout) -> Callable[..., Decoder]:
    """(settings of the model, of the method, storage) -> a decoder filled at random, LoRA and biases too, fp32."""

    def make(settings: dict | None = None, method: dict | None = None, quant: str | None = "nf4") -> Decoder:
        kind = storage(quant) if quant else None
        decoder = Decoder(ModelArgs(**ARGS | (settings or {})), dtype=torch.float32, storage=kind)
        peft = METHODS["peft"](METHODS["peft"].Settings(**method or {}))
        attachment = peft.attach(decoder) if method is not None else Attachment()
        initial = {}
        for target in targets(decoder):
            shape, norm = target.whole_shape(1), target.name.endswith("norm.weight")
            initial[target.name] = lambda generator, shape=shape, norm=norm: (
                0.2 * torch.randn(shape, generator=generator) + norm
            )
        fill(decoder, {}, Attachment(attachment.trainable, initial), layout, DataParallel(layout, "sdp", False))
        return decoder.requires_grad_(False).eval()

    return make


LAYER = {"norm": "layer", "n_kv_heads": 4, "gated": False}
CASES = {
    "plain": ({}, None, "nf4"),
    "lora": ({"rotary_layout": "halves"}, {"lora_rank": 4, "bias_tuning": True}, "nf4"),
    "some": ({"qkv_bias": True}, {"lora_rank": 20, "lora_targets": ["wq", "w2"], "lora_alpha": 7}, "fp4"),
    "window": ({"sliding_window": 4, "rotary_dim": 16}, {"lora_rank": 2, "lora_targets": ["wo", "w1"]}, "nf4_single"),
    "norms of heads": ({"qk_norm": True, "head_dim": 64, "rotary_layout": "halves"}, {"lora_rank": 4}, "nf4"),
    "OPT": (
        {
            **LAYER,
            "activation": "relu",
            "position": "learned",
            "position_offset": 2,
            "qkv_bias": True,
            "mlp_bias": True,
            "out_bias": True,
            "max_seq_len": 20,
        },
        {"lora_rank": 4},
        "nf4",
    ),
    "BLOOM": (
        {**LAYER, "position": "alibi", "embedding_norm": True, "tie_word_embeddings": True, "activation": "gelu_tanh"},
        {"lora_rank": 4, "bias_tuning": True},
        "nf4",
    ),
    "GPT-NeoX": (
        {
            **LAYER,
            "parallel_residual": True,
            "rotary_dim": 8,
            "rotary_layout": "halves",
            "qkv_bias": True,
            "activation": "gelu",
        },
        {"lora_rank": 4},
        None,
    ),
    "GPT-NeoX, some": (
        {**LAYER, "parallel_residual": True, "rotary_dim": 8},
        {"lora_rank": 2, "lora_targets": ["w1", "wo"]},
        "nf4",
    ),
    "GPT-NeoX, others": ({"parallel_residual": True}, {"lora_rank": 2, "lora_targets": ["wq"]}, "nf4"),
    "not packed": ({"qkv_bias": True}, {"lora_rank": 4}, None),
}


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_equals_the_modules(made: Callable[..., Decoder], case: str) -> None:
    """Two tokens one after the other, and what lies in the cache after them."""
    settings, method, quant = CASES[case]
    decoder = made(settings, method, quant)
    assert why_not(decoder) == ""
    ids = torch.arange(sum(LENGTHS)) * 37 % 96
    caches = [decoder.new_cache(len(LENGTHS) + 1, 16) for _ in range(2)]
    for cache in caches:
        with decoding():
            decoder(ids, decoder.sequences(LENGTHS), [layer.documents(0, len(LENGTHS)) for layer in cache])
    chain, positions = Chain(decoder, 16, decoding_products, decoding_attention), torch.tensor(LENGTHS)
    for tokens in (torch.tensor([7, 95, 30]), torch.tensor([80, 0, 11])):
        with decoding():
            part = [layer.documents(0, len(LENGTHS)) for layer in caches[0]]
            wanted = decoder(tokens, decoder.next_tokens(positions, 12), part)
            found = chain.forward(tokens, positions, caches[1], 12)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
        positions = positions + 1
    for one, other in zip(*caches, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(one.values, other.values, rtol=1e-3, atol=1e-3)
    assert (chain.nbytes > 0) == (method is not None)


@pytest.mark.parametrize(
    ("settings", "quant", "what"),
    [({"norm_placement": "both"}, "nf4", "norms"), ({"norm_placement": "after"}, "nf4", "norms"),
     ({"embedding_dim": 64}, "nf4", "width of embeddings"), ({}, "int4_g32", "storage"),
     ({"hidden_dim": 160}, "nf4", "width of matrices")],
)  # fmt: skip
def test_what_it_does_not_compute(made: Callable[..., Decoder], settings: dict, quant: str, what: str) -> None:
    """Is left to the modules."""
    assert why_not(made(settings, None, quant)) == what


def test_linears_of_different_storages(made: Callable[..., Decoder]) -> None:
    """Of two storages, one plain; an addition of attention's."""
    decoder = made()
    decoder.layers[1].attention.wo.weight = made(quant="nf4_single").layers[1].attention.wo.weight
    assert why_not(decoder) == "storages that differ"
    decoder = made()
    decoder.layers[1].attention.wo.weight = made(quant=None).layers[1].attention.wo.weight
    assert why_not(decoder) == "storages that differ"
    decoder = made(quant=None)
    decoder.layers[1].attention.wo.to(torch.bfloat16)
    assert why_not(decoder) == "storage"
    decoder = made()
    decoder.layers[2].attention.addition = torch.nn.Identity()
    assert why_not(decoder) == "what is added to attention"
