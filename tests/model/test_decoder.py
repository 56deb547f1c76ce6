"""The decoder against transformers, over packed documents, and with most of it frozen."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from accessory.errors import ConfigError
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder, VocabParallelEmbedding
from accessory.model.norm import LayerNorm
from accessory.parallel.tensor import slicing_of

ARGS = ModelArgs(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=160, vocab_size=96)
LENGTHS = (9, 1, 14)


def tokens(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Tensor:
    """Random ids [T]."""
    return torch.randint(0, 96, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


def run(decoder: Decoder, ids: Tensor, lengths: tuple[int, ...], **more) -> Tensor:
    """Normalized hidden states [T, D]."""
    return decoder(ids, decoder.sequences(lengths), **more)


def outputs(decoder: Decoder, ids: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """Of each block [T, D]."""
    sequences = decoder.sequences(lengths)
    return list(decoder.states(decoder.enter(ids, sequences), sequences))


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
    decoder = random_decoder(ARGS)
    seen = outputs(decoder, tokens(), LENGTHS)
    assert len(seen) == len(list(decoder.blocks())) == 3
    assert torch.equal(decoder.norm(seen[-1]), run(decoder, tokens(), LENGTHS))
    assert not torch.equal(seen[0], seen[1])


OTHERS = {
    "llama": {},
    "halves of a part": {"rotary_layout": "halves", "rotary_dim": 8},
    "window": {"sliding_window": 3, "sliding_layers": [0, 2]},
    "alibi": {"position": "alibi", "norm": "layer", "embedding_norm": True, "n_heads": 6, "head_dim": 16},
    "learned": {"position": "learned", "position_offset": 2, "max_seq_len": 20, "norm": "layer", "gated": False},
    "narrow": {"position": "learned", "embedding_dim": 24, "final_norm": False, "norm_placement": "after"},
    "parallel": {"parallel_residual": True, "norm": "layer", "activation": "gelu"},
    "norms": {"qk_norm": True, "norm_placement": "both"},
}


def other(name: str) -> ModelArgs:
    """ARGS changed to one of OTHERS."""
    return ModelArgs(**{**ARGS.model_dump(), "rotary_dim": None, "embedding_dim": None, **OTHERS[name]})


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_cache_equals_one_pass(random_decoder, name: str) -> None:
    """Prompts of unequal length, then single steps, against the whole documents at once."""
    args = other(name)
    decoder = random_decoder(args).eval()
    ids = tokens((7, 5)).split((7, 5))
    whole = run(decoder, torch.cat(ids), (7, 5)).split((7, 5))
    cache = decoder.new_cache(2, 7)
    assert cache[0].keys.shape == (2, 7, 2, 24 if name == "alibi" else 16)
    first = run(decoder, torch.cat([ids[0][:5], ids[1][:3]]), (5, 3), cache=cache).split((5, 3))
    parts = [[part] for part in first]
    for step in range(2):
        starts = (5 + step, 3 + step)
        new = torch.stack([document[start] for document, start in zip(ids, starts, strict=True)])
        hidden = decoder(new, decoder.sequences((1, 1), starts), cache)
        for part, row in zip(parts, hidden, strict=True):
            part.append(row[None])
    for part, wanted in zip(parts, whole, strict=True):
        torch.testing.assert_close(torch.cat(part), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_documents_are_apart_and_ordered(random_decoder, name: str) -> None:
    """Packing equals separate runs, and another order of the first tokens changes the last one's state."""
    decoder, ids = random_decoder(other(name)).eval(), tokens()
    found = run(decoder, ids, LENGTHS)
    separate = torch.cat([run(decoder, part, (len(part),)) for part in ids.split(LENGTHS)])
    torch.testing.assert_close(found, separate, rtol=1e-4, atol=1e-5)
    swapped = torch.cat([ids[[1, 0]], ids[2:]])
    assert (run(decoder, swapped, LENGTHS)[8] - found[8]).abs().max() > 1e-6


@torch.no_grad()
def test_learned_positions_are_added(random_decoder) -> None:
    """Row position + offset of a matrix of max_seq_len + offset rows, restarting in each document."""
    decoder, seen = random_decoder(other("learned")), []
    assert decoder.pos_embeddings.weight.shape == (22, 64)
    decoder.layers[0].register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    ids = tokens((3, 2))
    run(decoder, ids, (3, 2))
    wanted = decoder.tok_embeddings.weight[ids] + decoder.pos_embeddings.weight[[2, 3, 4, 2, 3]]
    assert torch.equal(seen[0], wanted)
    assert decoder.frequencies.numel() == 0


@torch.no_grad()
def test_narrow_embedding_is_led_in_and_out(random_decoder) -> None:
    """Projected before positions are added, and after the last block; no norm follows it."""
    decoder = random_decoder(other("narrow"))
    assert decoder.norm is None
    assert (decoder.project_in.weight.shape, decoder.project_out.weight.shape) == ((64, 24), (24, 64))
    assert decoder.tok_embeddings.weight.shape == decoder.output.weight.shape == (96, 24)
    ids = tokens((3, 2))
    entered = decoder.tok_embeddings.weight[ids] @ decoder.project_in.weight.t()
    wanted = entered + decoder.pos_embeddings.weight[[0, 1, 2, 0, 1]]
    torch.testing.assert_close(decoder.enter(ids, decoder.sequences((3, 2))), wanted)
    left = outputs(decoder, ids, (3, 2))[-1] @ decoder.project_out.weight.t()
    torch.testing.assert_close(run(decoder, ids, (3, 2)), left)


@torch.no_grad()
def test_embedding_norm(random_decoder) -> None:
    """Between the embedding and the first block."""
    decoder, seen = random_decoder(other("alibi")), []
    assert isinstance(decoder.tok_norm, LayerNorm)
    decoder.layers[0].register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    run(decoder, tokens((5,)), (5,))
    assert torch.equal(seen[0], decoder.tok_norm(decoder.tok_embeddings(tokens((5,)))))


@pytest.mark.parametrize(
    "changes",
    [{"position": "learned"}, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}],
    ids=["learned", "dynamic"],
)
def test_documents_beyond_the_last_position_are_refused(random_decoder, changes: dict) -> None:
    """With the length, the limit and the flags; what is in the cache counts."""
    decoder = Decoder(ModelArgs(**{**ARGS.model_dump(), "max_seq_len": 20, **changes}), dtype=torch.float32)
    decoder.sequences((3, 20))
    decoder.sequences((1, 1), (19, 4))
    for lengths, starts in (((3, 21), None), ((1, 1), (4, 20))):
        with pytest.raises(ConfigError, match=r"21 tokens.* for 20\. .*--max_words 20 .*--max_seq_len 20"):
            decoder.sequences(lengths, starts)
    Decoder(ARGS.model_copy(update={"max_seq_len": 20}), dtype=torch.float32).sequences((500,))


def test_alibi_ends_where_bf16_no_longer_tells_positions_apart() -> None:
    decoder = Decoder(other("alibi"), dtype=torch.bfloat16)
    decoder.sequences((1,), (65_535,))
    with pytest.raises(ConfigError, match=r"65537 tokens.* for 65536"):
        decoder.sequences((1,), (65_536,))


def test_heads_of_a_rank_have_their_own_slopes() -> None:
    """Rank 1 of 2 has the last three of six."""
    whole = Decoder(other("alibi"), dtype=torch.float32).sequences((4,)).alibi
    half = Decoder(other("alibi"), dtype=torch.float32, rank=1, ranks=2).sequences((4,)).alibi
    assert torch.equal(half[0], whole[0][3:])
    assert torch.equal(half[1], whole[1])


def test_rows_of_a_vocabulary_that_does_not_divide() -> None:
    """Four ranks of 10 rows each have 3, the last one of them 1 that counts."""
    embeddings = [VocabParallelEmbedding(10, 4, rank=rank, ranks=4, dtype=torch.float32) for rank in range(4)]
    assert [(e.start, e.stop) for e in embeddings] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert {e.weight.shape for e in embeddings} == {(3, 4)}
    assert slicing_of(embeddings[0].weight).whole_shape((3, 4), 4) == (10, 4)


def test_gradients_equal_transformers(pair) -> None:
    """Of norms, projections and embedding; rows of wq stand in Hugging Face's order, halves of a head apart."""
    model, decoder = pair(num_hidden_layers=1)
    decoder.requires_grad_().train()
    ids = tokens((12,))
    (run(decoder, ids, (12,)) @ decoder.head_weight.t()).square().sum().backward()
    model(ids[None]).logits.square().sum().backward()
    theirs, ours = model.model.layers[0], decoder.layers[0]
    for found, wanted in (
        (ours.attention.wq.weight.grad, theirs.self_attn.q_proj.weight.grad),
        (ours.attention.wo.weight.grad, theirs.self_attn.o_proj.weight.grad),
        (ours.feed_forward.w1.weight.grad, theirs.mlp.gate_proj.weight.grad),
        (ours.attention_norm.weight.grad, theirs.input_layernorm.weight.grad),
        (ours.ffn_norm.weight.grad, theirs.post_attention_layernorm.weight.grad),
        (decoder.norm.weight.grad, model.model.norm.weight.grad),
        (decoder.tok_embeddings.weight.grad, model.model.embed_tokens.weight.grad),
    ):
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OTHERS)
def test_trained_without_gradients_it_is_the_same(random_decoder, name: str, dtype: torch.dtype) -> None:
    """A base that a network beside it reads: the same bits, of documents and of few rows, and nothing is kept."""
    decoder = random_decoder(other(name), dtype, "nf4", trainable=("norm", "layers"))
    decoder.prepare_decoding()
    for lengths in (LENGTHS, (2,)):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            wanted = run(decoder, tokens(lengths), lengths)
            assert saved
            saved.clear()
            with torch.no_grad():
                found = run(decoder, tokens(lengths), lengths)
        assert torch.equal(found, wanted) and not saved


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_backward_stops_below_the_lowest_trained_parameter(random_decoder, quant: str | None) -> None:
    """With the norms of the last block trained, nothing below asks for a gradient, and frozen weights get none."""
    decoder = random_decoder(ARGS, torch.bfloat16, quant, trainable=("layers.2.ffn_norm",))
    seen = outputs(decoder, tokens(), LENGTHS)
    decoder.leave(seen[-1]).float().sum().backward()
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
