"""The block, and its recomputation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accessory.model.args import ModelArgs
from accessory.model.norm import Norm
from accessory.model.sequences import Sequences

ARGS = ModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=160, vocab_size=96)


def run(block, frequencies: Tensor, *, lengths: tuple[int, ...] = (7, 5)) -> tuple[Tensor, Tensor, int]:
    """(output, input's gradient, bytes saved other than parameters) of one pass over fixed input."""
    x = torch.randn(sum(lengths), 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        store = tensor.untyped_storage()
        if store.data_ptr() not in weights:
            saved[store.data_ptr()] = store.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = block(x, Sequences.build(lengths, frequencies))
    y.square().sum().backward()
    return y.detach(), x.grad, sum(saved.values())


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_recomputing_changes_nothing_but_memory(random_decoder, quant: str | None) -> None:
    """Same output and gradients, to the bit; only the input is kept."""
    decoder = random_decoder(ARGS, quant=quant, trainable=("norm", "wv.weight") if not quant else ("norm",))
    block = decoder.layers[0]
    plain = run(block, decoder.frequencies)
    gradients = [p.grad for p in block.parameters() if p.grad is not None]
    block.zero_grad(set_to_none=True)
    block.recompute = True
    again = run(block, decoder.frequencies)
    assert torch.equal(plain[0], again[0])
    assert torch.equal(plain[1], again[1])
    repeated = [p.grad for p in block.parameters() if p.grad is not None]
    assert len(gradients) == (2 if quant else 3)
    assert all(torch.equal(one, two) for one, two in zip(gradients, repeated, strict=True))
    assert again[2] == 12 * 64 * 4
    assert plain[2] > 5 * again[2]


@pytest.mark.parametrize(
    ("settings", "skipped"),
    [({}, 1), ({"parallel_residual": True}, 2), ({"norm_placement": "after"}, 0), ({"norm_placement": "both"}, 0)],
)
def test_run_again_makes_no_product_that_is_not_read(random_decoder, settings: dict, skipped: int) -> None:
    """The second forward has the linears' products but those of which only the block's result is made."""
    decoder = random_decoder(ARGS.model_copy(update=settings), trainable=("norm", "bias"))
    block = decoder.layers[0]
    counts = []
    for block.recompute in (False, True):
        with torch.profiler.profile() as profiled:
            run(block, decoder.frequencies)
        counts.append(sum(e.name in ("aten::mm", "aten::addmm", "aten::addmm_") for e in profiled.events()))
    assert counts[1] - counts[0] == 7 - skipped


def test_block_is_two_residuals(random_decoder) -> None:
    """x + attention(norm x), then + feed_forward(norm of that)."""
    decoder = random_decoder(ARGS)
    block, sequences = decoder.layers[0], Sequences.build((4, 2), decoder.frequencies)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    middle = x + block.attention(block.attention_norm(x), sequences)
    wanted = middle + block.feed_forward(block.ffn_norm(middle))
    torch.testing.assert_close(block(x, sequences), wanted)
    assert (wanted - x).abs().max() > 0.1


def test_asking_uses_the_cache_though_training_recomputes(random_decoder) -> None:
    """In eval mode `recompute` stands aside, and the second half sees the first."""
    decoder = random_decoder(ARGS).eval()
    block = decoder.layers[0]
    block.recompute = True
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    whole = block(x, Sequences.build((6,), decoder.frequencies))
    (cache,) = decoder.new_cache(1, 6)
    parts = [
        block(x[:4], Sequences.build((4,), decoder.frequencies), cache),
        block(x[4:], Sequences.build((2,), decoder.frequencies, (4,)), cache),
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def placed(block, placement: str, parallel: bool, x: Tensor, sequences: Sequences) -> Tensor:
    """The block written out."""
    if placement == "after":
        x = block.attention_norm(x + block.attention(x, sequences))
        return block.ffn_norm(x + block.feed_forward(x))
    attended = block.attention(block.attention_norm(x), sequences)
    if placement == "both":
        attended = block.attention_post_norm(attended)
    fed = block.feed_forward(block.ffn_norm(x if parallel else x + attended))
    return x + attended + (block.ffn_post_norm(fed) if placement == "both" else fed)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize(
    ("placement", "parallel", "norms"), [("before", True, 2), ("after", False, 2), ("both", False, 4)]
)
def test_placement_of_norms_and_residuals(
    random_decoder, placement: str, parallel: bool, norms: int, norm: str
) -> None:
    """Each is itself, and none is another."""
    settings = {"norm_placement": placement, "parallel_residual": parallel, "norm": norm}
    decoder = random_decoder(ARGS.model_copy(update=settings))
    block, sequences = decoder.layers[0], decoder.sequences((4, 2))
    for module in block.modules():
        if isinstance(module, Norm):
            module.weight.data += 1
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    found = block(x, sequences)
    torch.testing.assert_close(found, placed(block, placement, parallel, x, sequences))
    assert sum(isinstance(module, Norm) for module in block.modules()) == norms
    if placement != "both":
        other = placed(block, "before", not parallel, x, sequences)
        assert (found - other).abs().max() > 0.01
