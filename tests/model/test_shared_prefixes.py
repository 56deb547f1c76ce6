"""Documents that begin alike, packed once, against the same documents packed one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.data.batch import IGNORE, Document, PackedBatch
from accessory.memory.recompute import recompute_layers
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.loss import cross_entropy_sum

CPU = torch.device("cpu")
PLAIN = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 160, "vocab_size": 96}
MODELS = {
    "llama": {},
    "halves": {"rotary_layout": "halves"},
    "window": {"sliding_window": 5},
    "alibi": {"position": "alibi"},
    "learned": {"position": "learned", "max_seq_len": 64},
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_those_of_documents_one_by_one(random_decoder, name: str) -> None:
    """In float64, of every weight, whatever tells positions apart."""
    one_by_one, shared = batches()
    assert len(shared.tokens) < len(one_by_one.tokens) - 20
    assert one_by_one.shared == (0,) * 6
    decoder = random_decoder(ModelArgs(**PLAIN, **MODELS[name]), torch.float64, trainable=("",))
    (wanted, wanted_gradients), (loss, gradients) = (loss_and_gradients(decoder, b) for b in (one_by_one, shared))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert wanted_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert (gradient - wanted_gradients[key]).norm() <= 1e-7 * wanted_gradients[key].norm()  # norms are fp32


@pytest.mark.parametrize("name", MODELS)
def test_prompts_that_weigh_something_are_shared_exactly(random_decoder, name: str) -> None:
    """In float64, against the weighted losses of each document's own logits; answers of two documents begin alike."""
    decoder = random_decoder(ModelArgs(**PLAIN, **MODELS[name]), torch.float64, trainable=("",))
    generator, made = torch.Generator().manual_seed(6), []
    start, answers = draw(generator, 12), draw(generator, 8)
    for i in range(4):
        tokens = torch.cat([start[: 12 - i % 2], answers[: 5 + i], draw(generator, i)]).numpy()
        weights = np.where(np.arange(len(tokens)) < 11, 0.125, 1).astype(np.float32)
        made.append(Document(tokens, np.append(tokens[1:], IGNORE), i, weights=weights))
    batch = PackedBatch.pack(made)
    assert max(batch.shared) > 12 and len(batch.tokens) < sum(batch.lengths) - 20
    loss, gradients = loss_and_gradients(decoder, batch)
    decoder.zero_grad(set_to_none=True)
    wanted = 0.0
    for document in made:
        tokens, weights = torch.from_numpy(document.tokens), torch.from_numpy(document.weights).double()
        logits = decoder(tokens, decoder.sequences((len(tokens),))) @ decoder.head_weight.t()
        wanted = wanted + F.cross_entropy(logits[:-1], tokens[1:], reduction="none") @ weights[:-1]
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    for key, parameter in decoder.named_parameters():
        assert (gradients[key] - parameter.grad).norm() <= 1e-7 * parameter.grad.norm(), key  # norms are fp32


def test_packed_base_and_recomputed_blocks(random_decoder) -> None:
    """NF4 in bf16 with the norms trained: within bf16's rounding; blocks that are run again change no bit."""
    decoder = random_decoder(ModelArgs(**PLAIN), torch.bfloat16, "nf4", trainable=("norm",))
    one_by_one, shared = batches()
    wanted, wanted_gradients = loss_and_gradients(decoder, one_by_one)
    loss, gradients = loss_and_gradients(decoder, shared)
    assert loss.item() == pytest.approx(wanted.item(), rel=5e-3)
    for key, gradient in gradients.items():
        assert (gradient - wanted_gradients[key]).norm() < 0.05 * wanted_gradients[key].norm()
    recompute_layers(decoder, 3, offload=False, device=CPU)
    again, gradients_again = loss_and_gradients(decoder, shared)
    assert torch.equal(again, loss)
    assert all(torch.equal(gradients_again[key], gradient) for key, gradient in gradients.items())


def batches() -> tuple[PackedBatch, PackedBatch]:
    """Six documents of two kinds of beginnings, that begin alike themselves: packed one by one, and shared."""
    generator = torch.Generator().manual_seed(5)
    start, kinds = draw(generator, 3), [draw(generator, 6), draw(generator, 9)]
    made = []
    for i in range(6):
        prompt, answer = torch.cat([start, kinds[i % 2], draw(generator, i)]), draw(generator, 4 + i)
        tokens = torch.cat([prompt, answer])
        labels = torch.cat([torch.full((len(prompt) - 1,), IGNORE), answer, torch.tensor([IGNORE])])
        made.append((tokens.numpy(), labels.numpy(), i))
    return PackedBatch.pack(made, share=False), PackedBatch.pack(made)


def draw(generator: torch.Generator, count: int) -> Tensor:
    """Random tokens [count]."""
    return torch.randint(0, PLAIN["vocab_size"], (count,), generator=generator)


def loss_and_gradients(decoder: Decoder, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a training step's forward and backward, by parameter."""
    decoder.zero_grad(set_to_none=True)
    hidden = decoder(batch.tokens, decoder.sequences(batch.lengths, shared=batch.shared))
    loss = cross_entropy_sum(hidden, decoder.head_weight, batch.labels, weights=batch.weights)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
