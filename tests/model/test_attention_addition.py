"""What a method puts between attention and `wo`: prefixes, against their formula; two ranks are in test_ranks.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accessory.checkpoint.load import fill, targets
from accessory.generate import generate_tokens
from accessory.method import Attachment
from accessory.model.args import ModelArgs
from accessory.model.attention import Attention
from accessory.model.decoder import Decoder
from accessory.model.position import rotate
from accessory.parallel.data import DataParallel
from tests.model.conftest import normal
from tests.model.prefixes import ROWS, Prefixes
from tests.model.test_attention import written_out

ARGS = ModelArgs(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, hidden_dim=80, vocab_size=96)
LENGTHS = (5, 1, 7)


@pytest.fixture
def decoder(layout) -> Decoder:
    """Filled at random, fp32."""
    made = Decoder(ARGS, dtype=torch.float32)
    attachment = Prefixes(Prefixes.Settings()).attach(made)
    initial = {
        target.name: normal(target.whole_shape(1), 1.0 if "addition" in target.name else 0.2)
        for target in targets(made)
    }
    fill(made, {}, Attachment(attachment.trainable, initial), layout, DataParallel(layout, "sdp", False))
    return made


def by_formula(attention: Attention, x: Tensor, rotations: Tensor) -> Tensor:
    """One document in float64: attention, and what every query makes of the prefix."""
    q, k, v = (x @ w.weight.double().t() for w in (attention.wq, attention.wk, attention.wv))
    q, k, v = (t.view(len(x), -1, 8) for t in (q, k, v))
    q, k = (rotate(t, rotations) for t in (q, k))
    rows = attention.addition.rows.double()
    keys, values = ((rows @ w.weight.double().t()).view(ROWS, 2, 8) for w in (attention.wk, attention.wv))
    out = written_out(q, k, v)
    for head in range(6):
        weights = (q[:, head] @ keys[:, head // 3].t() / 8**0.5).softmax(-1)
        out[:, head] += attention.addition.gate[head].double().tanh() * (weights @ values[:, head // 3])
    return out.flatten(1) @ attention.wo.weight.double().t()


def test_equals_the_formula(decoder: Decoder) -> None:
    """Of packed documents, and the gradients of rows and gate."""
    attention, sequences = decoder.layers[0].attention, decoder.sequences(LENGTHS)
    x = torch.randn(sum(LENGTHS), 48, generator=torch.Generator().manual_seed(0))
    parameters = (attention.addition.rows, attention.addition.gate)
    wanted = [
        by_formula(attention, part.double(), rotations)
        for part, rotations in zip(
            x.split(LENGTHS), sequences.rotations.to(torch.complex128).split(LENGTHS), strict=True
        )
    ]
    wanted, found = torch.cat(wanted), attention(x, sequences)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(y.square().sum(), parameters) for y in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    attention.addition = None
    assert (attention(x, sequences) - found).norm() > 0.1 * found.norm()


@torch.no_grad()
def test_keys_are_made_once_a_decode(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy answers step by step are those of whole documents."""
    decoder.eval()
    made, kind = [], type(decoder.layers[0].attention.addition)
    inner = kind._keys_and_values
    monkeypatch.setattr(kind, "_keys_and_values", lambda self, *given: made.append(self) or inner(self, *given))
    prompt = [1, 2, 3]
    answer = [token for (token,) in generate_tokens(decoder, [prompt], max_gen_len=6, max_seq_len=32, stop_ids=set())]
    assert len(made) == len(decoder.layers)
    ids = torch.tensor(prompt + answer)
    likeliest = (decoder.eval()(ids, decoder.sequences((9,))) @ decoder.head_weight.t()).argmax(-1)
    assert likeliest[2:-1].tolist() == answer
