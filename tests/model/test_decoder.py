"""The decoder against transformers, over packed documents, and with most of it frozen."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder, VocabParallelEmbedding
from accessory.model.sequences import Sequences

ARGS = ModelArgs(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=160, vocab_size=96)
LENGTHS = (9, 1, 14)


def tokens(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Tensor:
    """Random ids [T]."""
    return torch.randint(0, 96, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


def run(decoder: Decoder, ids: Tensor, lengths: tuple[int, ...], **more) -> Tensor:
    """Normalized hidden states [T, D]."""
    return decoder(ids, Sequences.build(lengths, decoder.frequencies), **more)


@torch.no_grad()
def test_packed_documents_equal_transformers_one_by_one(pair) -> None:
    """Three documents in one pass, against three passes of transformers."""
    model, decoder = pair()
    ids = tokens()
    found = run(decoder, ids, LENGTHS) @ decoder.head_weight.t()
    wanted = torch.cat([model(part[None]).logits[0] for part in ids.split(LENGTHS)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert wanted.std() > 0.3  # the tolerance means something


@torch.no_grad()
def test_packing_equals_separate_runs(random_decoder) -> None:
    """Only rounding tells them apart."""
    decoder, ids = random_decoder(ARGS), tokens()
    separate = torch.cat([run(decoder, part, (len(part),)) for part in ids.split(LENGTHS)])
    torch.testing.assert_close(run(decoder, ids, LENGTHS), separate, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_documents_do_not_see_their_neighbours(random_decoder, quant: str | None) -> None:
    """Another middle document changes no bit of the others' hidden states."""
    decoder, lengths = random_decoder(ARGS, torch.bfloat16, quant), (6, 5, 8)
    ids, other = tokens(lengths), tokens(lengths, seed=1)
    changed = torch.cat([ids[:6], other[6:11], ids[11:]])
    before, after = run(decoder, ids, lengths), run(decoder, changed, lengths)
    assert torch.equal(before[:6], after[:6])
    assert torch.equal(before[11:], after[11:])
    assert not torch.equal(before[6:11], after[6:11])


@torch.no_grad()
def test_tokens_see_no_later_token(random_decoder) -> None:
    """Another last token changes no bit before it."""
    decoder, ids = random_decoder(ARGS), tokens((8,))
    before = run(decoder, ids, (8,))
    ids[-1] = (ids[-1] + 1) % 96
    after = run(decoder, ids, (8,))
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])


@torch.no_grad()
def test_embeddings_enter_in_place_of_tokens(random_decoder) -> None:
    """The lower end is open."""
    decoder, ids = random_decoder(ARGS), tokens()
    assert torch.equal(run(decoder, decoder.tok_embeddings(ids), LENGTHS), run(decoder, ids, LENGTHS))


@torch.no_grad()
def test_block_outputs_are_handed_out(random_decoder) -> None:
    """The upper end too: each block's output in order; the last, normalized, is the result."""
    decoder, seen = random_decoder(ARGS), []
    hidden = run(decoder, tokens(), LENGTHS, on_block=lambda i, x: seen.append((i, x)))
    assert [i for i, _ in seen] == [0, 1, 2]
    assert torch.equal(decoder.norm(seen[-1][1]), hidden)
    assert not torch.equal(seen[0][1], seen[1][1])


@torch.no_grad()
def test_cache_equals_one_pass(random_decoder) -> None:
    """Prompts of unequal length, then single steps, against the whole documents at once."""
    decoder = random_decoder(ARGS).eval()
    ids = tokens((7, 5)).split((7, 5))
    whole = run(decoder, torch.cat(ids), (7, 5)).split((7, 5))
    cache = decoder.new_cache(2, 7)
    assert cache[0].keys.shape == (2, 7, 2, 16)
    first = run(decoder, torch.cat([ids[0][:5], ids[1][:3]]), (5, 3), cache=cache).split((5, 3))
    parts = [[part] for part in first]
    for step in range(2):
        starts = (5 + step, 3 + step)
        new = torch.stack([document[start] for document, start in zip(ids, starts, strict=True)])
        hidden = decoder(new, Sequences.build((1, 1), decoder.frequencies, starts), cache)
        for part, row in zip(parts, hidden, strict=True):
            part.append(row[None])
    for part, wanted in zip(parts, whole, strict=True):
        torch.testing.assert_close(torch.cat(part), wanted, rtol=1e-4, atol=1e-5)


def test_gradients_equal_transformers(pair) -> None:
    """Of norms, projections and embedding, after the rows of wq are put back in Hugging Face's order."""
    model, decoder = pair(num_hidden_layers=1)
    decoder.requires_grad_().train()
    ids = tokens((12,))
    (run(decoder, ids, (12,)) @ decoder.head_weight.t()).square().sum().backward()
    model(ids[None]).logits.square().sum().backward()
    theirs, ours = model.model.layers[0], decoder.layers[0]
    wq = ours.attention.wq.weight.grad.unflatten(0, (4, 8, 2)).transpose(1, 2).flatten(0, 2)
    for found, wanted in (
        (wq, theirs.self_attn.q_proj.weight.grad),
        (ours.attention.wo.weight.grad, theirs.self_attn.o_proj.weight.grad),
        (ours.feed_forward.w1.weight.grad, theirs.mlp.gate_proj.weight.grad),
        (ours.attention_norm.weight.grad, theirs.input_layernorm.weight.grad),
        (ours.ffn_norm.weight.grad, theirs.post_attention_layernorm.weight.grad),
        (decoder.norm.weight.grad, model.model.norm.weight.grad),
        (decoder.tok_embeddings.weight.grad, model.model.embed_tokens.weight.grad),
    ):
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_backward_stops_below_the_lowest_trained_parameter(random_decoder, quant: str | None) -> None:
    """With the norms of the last block trained, nothing below asks for a gradient, and frozen weights get none."""
    decoder = random_decoder(ARGS, torch.bfloat16, quant, trainable=("layers.2.ffn_norm",))
    seen: list[Tensor] = []
    hidden = run(decoder, tokens(), LENGTHS, on_block=lambda i, x: seen.append(x))
    hidden.float().sum().backward()
    assert [x.requires_grad for x in seen] == [False, False, True]
    assert {name for name, p in decoder.named_parameters() if p.grad is not None} == {"layers.2.ffn_norm.weight"}


def test_frozen_embedding_gives_the_first_block_no_gradient_to_form(random_decoder) -> None:
    """With every norm trained, the first block's input still needs no gradient."""
    decoder = random_decoder(ARGS, torch.bfloat16, "nf4", trainable=("norm",))
    inputs: list[Tensor] = []
    decoder.layers[0].register_forward_pre_hook(lambda _module, given: inputs.append(given[0]))
    run(decoder, tokens(), LENGTHS).float().sum().backward()
    assert not inputs[0].requires_grad
    trained = {name for name, p in decoder.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in decoder.named_parameters() if "norm" in name}


def test_embedding_of_another_rank_is_zero(layout) -> None:
    """Rank 1 of 2 looks up ids 8 to 15, and adds nothing for the rest."""
    embedding = VocabParallelEmbedding(16, 4, rank=1, ranks=2, dtype=torch.float32)
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    embedding.weight = torch.nn.Parameter(rows)
    found = embedding(torch.tensor([0, 7, 8, 15]))
    assert not found[:2].any()
    assert torch.equal(found[2:], rows[[0, 7]])


def test_tied_head_is_the_embedding(pair) -> None:
    """One matrix, listed once."""
    model, decoder = pair(tie_word_embeddings=True)
    assert decoder.output is None
    assert decoder.head_weight is decoder.tok_embeddings.weight
    assert torch.equal(decoder.head_weight, model.lm_head.weight)


def test_attention_bias_and_wide_heads(pair) -> None:
    """All biases and heads wider than dim / heads at once, through one block and back."""
    model, decoder = pair(attention_bias=True, mlp_bias=True, head_dim=24)
    ids = tokens((12,))
    assert isinstance(model, transformers.LlamaForCausalLM)
    found = run(decoder, ids, (12,)) @ decoder.head_weight.t()
    torch.testing.assert_close(found, model(ids[None]).logits[0], rtol=0, atol=1e-4)
