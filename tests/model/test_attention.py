"""Attention against a softmax written out, document by document."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from accessory import kernels
from accessory.model.args import ModelArgs
from accessory.model.attention import Attention, attend_cached
from accessory.model.cache import LayerCache
from accessory.model.position import ALIBI_WIDTH, alibi_channels, append_alibi, rotate
from accessory.model.sequences import Sequences
from accessory.parallel.tensor import Slicing, slicing_of

HEADS, KV_HEADS, WIDTH = 6, 2, 8
FREQUENCIES = torch.ones(WIDTH // 2)
LENGTHS = (5, 1, 9)


def attend(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, *more: object, **named: object) -> Tensor:
    """As attention calls it."""
    return kernels.of("document_attention", q, q.shape[-1]).attend(q, k, v, sequences.documents, *more, **named)


def qkv(dtype: torch.dtype = torch.float32, kv_heads: int = KV_HEADS, tokens: int = sum(LENGTHS)) -> list[Tensor]:
    """Random q [T, H, E], k and v [T, K, E]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, heads, WIDTH, generator=generator).to(dtype) for heads in (HEADS, kv_heads, kv_heads)]


def written_out(q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor:
    """One document in float64: queries [S, H, E] at positions from `start` against keys [start + S, K, E]."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        for i in range(len(q)):
            seen = slice(0, start + i + 1)
            weights = (k[seen, shared] @ q[i, head] / math.sqrt(q.shape[-1])).softmax(0)
            out[i, head] = weights @ v[seen, shared]
    return out


def per_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`written_out` for each of the packed documents."""
    return torch.cat([written_out(*parts) for parts in zip(*(t.split(LENGTHS) for t in (q, k, v)), strict=True)])


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_equals_softmax(kv_heads: int) -> None:
    """Multi-query, grouped and full attention over three packed documents."""
    q, k, v = qkv(kv_heads=kv_heads)
    found = attend(q, k, v, Sequences.build(LENGTHS, FREQUENCIES))
    torch.testing.assert_close(found.double(), per_document(q, k, v), rtol=1e-5, atol=1e-6)


def test_gradients_equal_softmax() -> None:
    """Of q, k and v, grouped."""
    ours, theirs = ([t.requires_grad_() for t in qkv()] for _ in range(2))
    attend(*ours, Sequences.build(LENGTHS, FREQUENCIES)).square().sum().backward()
    total = 0
    for q, k, v in zip(*(t.split(LENGTHS) for t in theirs), strict=True):
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        scores = torch.einsum("ihe,jhe->hij", q, k) / math.sqrt(WIDTH)
        scores = scores + torch.full(scores.shape[1:], -torch.inf).triu(1)
        total = total + torch.einsum("hij,jhe->ihe", scores.softmax(-1), v).square().sum()
    total.backward()
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-5)


def test_documents_do_not_see_each_other() -> None:
    """Other keys and values in the middle document change no bit of its neighbours."""
    q, k, v = qkv()
    sequences = Sequences.build(LENGTHS, FREQUENCIES)
    before = attend(q, k, v, sequences)
    k[5:6] += 1
    v[5:6] += 1
    after = attend(q, k, v, sequences)
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[6:], after[6:])
    assert not torch.equal(before[5:6], after[5:6])


def fed(steps: list[tuple[int, ...]]) -> Tensor:
    """The packed documents' outputs when they are fed to a cache in `steps` of new tokens each."""
    q, k, v = (t.split(LENGTHS) for t in qkv())
    cache = LayerCache((len(LENGTHS), max(LENGTHS), KV_HEADS, WIDTH), torch.float32, torch.device("cpu"))
    starts, outputs = (0,) * len(LENGTHS), [[] for _ in LENGTHS]
    for lengths in steps:
        sequences = Sequences.build(lengths, FREQUENCIES, starts)
        new = [torch.cat([t[i][s : s + n] for i, (s, n) in enumerate(zip(starts, lengths, strict=True))])
               for t in (q, k, v)]  # fmt: skip
        cache.store(new[1], new[2], sequences)
        for part, output in zip(attend_cached(new[0], cache, sequences).split(lengths), outputs, strict=True):
            output.append(part)
        starts = tuple(s + n for s, n in zip(starts, lengths, strict=True))
    assert starts == LENGTHS
    return torch.cat([torch.cat(output) for output in outputs])


@pytest.mark.parametrize(
    "steps", [[LENGTHS], [(2, 1, 4), (3, 0, 5)], [(4, 0, 8), (1, 1, 1)], [(3, 0, 0), (1, 0, 8), (1, 1, 1)]]
)
def test_cache_equals_softmax(steps: list[tuple[int, ...]]) -> None:
    """All at once, in chunks behind a filled cache, and as one decoding step of documents of different length."""
    torch.testing.assert_close(fed(steps).double(), per_document(*qkv()), rtol=1e-5, atol=1e-6)


def test_decoding_one_document() -> None:
    """A lone document, token by token."""
    q, k, v = qkv(tokens=4)
    cache = LayerCache((1, 4, KV_HEADS, WIDTH), torch.float32, torch.device("cpu"))
    parts = []
    for i in range(4):
        sequences = Sequences.build((1,), FREQUENCIES, (i,))
        cache.store(k[i : i + 1], v[i : i + 1], sequences)
        parts.append(attend_cached(q[i : i + 1], cache, sequences))
    torch.testing.assert_close(torch.cat(parts).double(), written_out(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (3, 1, 2)])
def test_cached_in_bf16(lengths: tuple[int, ...], window: int | None) -> None:
    """New tokens of documents that have 2, 9 and 16, one each or several: as in float64, and each as it is alone."""
    starts, generator = (2, 9, 16), torch.Generator().manual_seed(0)
    cache = LayerCache((3, 18, KV_HEADS, WIDTH), torch.bfloat16, torch.device("cpu"))
    for t in (cache.keys, cache.values):
        t.normal_(generator=generator)
    q = torch.randn(sum(lengths), HEADS, WIDTH, generator=generator).bfloat16()
    found = attend_cached(q, cache, Sequences.build(lengths, FREQUENCIES, starts), window).split(lengths)
    for i, (part, start) in enumerate(zip(q.split(lengths), starts, strict=True)):
        alone = Sequences.build((len(part),), FREQUENCIES, (start,))
        assert torch.equal(found[i], attend_cached(part, cache.documents(i, i + 1), alone, window))
        keys, values = (t[i, : start + len(part)] for t in (cache.keys, cache.values))
        wanted = dense(part, keys, values, window=window, start=start)
        torch.testing.assert_close(found[i].double(), wanted, rtol=2**-6, atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel is for CUDA")
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_cuda_kernel_equals_softmax(kv_heads: int) -> None:
    """In bf16, forward within 1 % of the largest value."""
    q, k, v = (t.cuda() for t in qkv(torch.bfloat16, kv_heads))
    found = attend(q, k, v, Sequences.build(LENGTHS, FREQUENCIES.cuda())).cpu().double()
    wanted = per_document(q.cpu(), k.cpu(), v.cpu())
    assert (found - wanted).abs().max() < 0.01 * wanted.abs().max()


def dense(
    q: Tensor, k: Tensor, v: Tensor, *, slopes: Tensor | None = None, window: int | None = None, start: int = 0
) -> Tensor:
    """One document in float64, all scores at once: q [S, H, E] at positions from `start`, k and v [start + S, K, E].

    slopes [H]: of a bias slope x (key - query). window: keys seen up to the query's own.
    """
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    distance = torch.arange(len(k)) - (start + torch.arange(len(q)))[:, None]
    scores = torch.einsum("ihe,jhe->hij", q, k) / math.sqrt(q.shape[-1])
    if slopes is not None:
        scores = scores + slopes[:, None, None] * distance
    hidden = distance > 0 if window is None else (distance > 0) | (distance <= -window)
    return torch.einsum("hij,jhe->ihe", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def packed_dense(leaves: list[Tensor], **more) -> Tensor:
    """`dense` for each of the packed documents."""
    return torch.cat([dense(*parts, **more) for parts in zip(*(t.split(LENGTHS) for t in leaves), strict=True)])


def same_with_gradients(ours: list[Tensor], theirs: list[Tensor], found: Tensor, wanted: Tensor) -> None:
    """Value, and gradients of a random weighting of it."""
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 9, 20])
def test_window_equals_dense(window: int, kv_heads: int) -> None:
    """Shorter than, as long as and longer than documents of 5, 1 and 9 tokens, in value and gradients."""
    ours, theirs = ([t.requires_grad_() for t in qkv(kv_heads=kv_heads)] for _ in range(2))
    found = attend(*ours, Sequences.build(LENGTHS, FREQUENCIES), window)
    same_with_gradients(ours, theirs, found, packed_dense(theirs, window=window))


def alibi_sequences(lengths: tuple[int, ...], slopes: Tensor, starts: tuple[int, ...] | None = None) -> Sequences:
    """Documents whose tokens attend by distance."""
    sequences = Sequences.build(lengths, FREQUENCIES, starts)
    return sequences.with_alibi(alibi_channels(slopes, sequences.positions, WIDTH, torch.float32))


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.7, 0.3], dtype=torch.float64)
SCALE = WIDTH**-0.5


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [2, 6])
def test_alibi_equals_dense(kv_heads: int, window: int | None) -> None:
    """In value and gradients, with shared key heads and under a window too."""
    ours, theirs = ([t.requires_grad_() for t in qkv(kv_heads=kv_heads)] for _ in range(2))
    sequences = alibi_sequences(LENGTHS, SLOPES)
    found = attend(*append_alibi(*ours, sequences.alibi), sequences, window, SCALE)[..., :WIDTH]
    wanted = packed_dense(theirs, slopes=SLOPES, window=window)
    same_with_gradients(ours, theirs, found, wanted)
    assert (wanted - packed_dense(theirs, window=window)).abs().max() > 0.1  # the slopes matter


def test_alibi_in_bf16_far_from_the_beginning() -> None:
    """The last of 3,000 tokens: within 1 % of the dense formula on the same bf16 values, whose scores reach 2,100."""
    q, k, v = qkv(torch.bfloat16, tokens=3000)
    sequences = Sequences.build((3000,), FREQUENCIES)
    channels = alibi_channels(SLOPES, sequences.positions, WIDTH, torch.bfloat16)
    found = attend(*append_alibi(q, k, v, channels), sequences, scale=SCALE)[-64:, :, :WIDTH].double()
    wanted = dense(q[-64:], k, v, slopes=SLOPES, start=2936)
    assert (found - wanted).abs().max() < 0.01 * wanted.abs().max()


@pytest.mark.parametrize("window", [None, 1, 3, 4])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(
    "steps", [[LENGTHS], [(2, 1, 4), (3, 0, 5)], [(4, 0, 8), (1, 1, 1)], [(3, 0, 0), (1, 0, 8), (1, 1, 1)],
              [(4, 1, 7), (1, 0, 0), (0, 0, 1), (0, 0, 1)]]
)  # fmt: skip
def test_cache_with_window_and_alibi(steps: list[tuple[int, ...]], alibi: bool, window: int | None) -> None:
    """All at once, in chunks behind a filled cache, and step by step, against the dense formula."""
    whole = qkv()
    split = [t.split(LENGTHS) for t in whole]
    width = WIDTH + (ALIBI_WIDTH if alibi else 0)
    cache = LayerCache((len(LENGTHS), max(LENGTHS), KV_HEADS, width), torch.float32, torch.device("cpu"))
    starts, outputs = (0,) * len(LENGTHS), [[] for _ in LENGTHS]
    for lengths in steps:
        sequences = alibi_sequences(lengths, SLOPES, starts)
        places = list(enumerate(zip(starts, lengths, strict=True)))
        new = [torch.cat([t[i][s : s + n] for i, (s, n) in places]) for t in split]
        q, k, v = append_alibi(*new, sequences.alibi) if alibi else new
        cache.store(k, v, sequences)
        found = attend_cached(q, cache, sequences, window, SCALE)[..., :WIDTH]
        for part, output in zip(found.split(lengths), outputs, strict=True):
            output.append(part)
        starts = tuple(s + n for s, n in zip(starts, lengths, strict=True))
    assert starts == LENGTHS
    found = torch.cat([torch.cat(output) for output in outputs])
    wanted = packed_dense(whole, slopes=SLOPES if alibi else None, window=window)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def filled(**settings) -> Attention:
    """A layer of 6 heads of width 8 (2 for keys), random fp32 weights."""
    args = ModelArgs(dim=48, n_heads=6, n_kv_heads=2, **settings)
    layer, generator = Attention(args, 0, 1, dtype=torch.float32), torch.Generator().manual_seed(0)
    for name, parameter in list(layer.named_parameters()):
        owner, leaf = name.rsplit(".", 1)
        value = torch.randn(parameter.shape, generator=generator) / 4 + (parameter.dim() == 1)
        setattr(layer.get_submodule(owner), leaf, torch.nn.Parameter(value))
    return layer


def test_norms_of_queries_and_keys() -> None:
    """Each head over its own channels, before it is rotated; the weights are shared by all heads."""
    layer = filled(qk_norm=True, norm_eps=1e-3)
    x = torch.randn(sum(LENGTHS), 48, generator=torch.Generator().manual_seed(3))
    sequences = Sequences.build(LENGTHS, FREQUENCIES)
    q, k, v = (torch.nn.functional.linear(x, w.weight).unflatten(-1, (-1, 8)) for w in (layer.wq, layer.wk, layer.wv))
    q, k = (
        rotate(t * (t.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * norm.weight, sequences.rotations)
        for t, norm in ((q, layer.q_norm), (k, layer.k_norm))
    )
    wanted = packed_dense([q, k, v]).flatten(1) @ layer.wo.weight.t().double()
    torch.testing.assert_close(layer(x, sequences).double(), wanted, rtol=1e-4, atol=1e-4)


def test_norms_of_queries_and_keys_get_a_share_of_their_gradient() -> None:
    """That of this rank's heads; the ranks' sum is the whole."""
    layer = Attention(ModelArgs(dim=48, n_heads=6, qk_norm=True), 0, 2, dtype=torch.float32)
    for norm in (layer.q_norm, layer.k_norm):
        assert slicing_of(norm.weight) == Slicing(partial=True)
        assert norm.weight.shape == (8,)


@pytest.mark.parametrize(
    ("settings", "more"),
    [({"position": "alibi"}, {"slopes": SLOPES}), ({"position": "learned"}, {}),
     ({"position": "learned", "sliding_window": 3}, {"window": 3}),
     ({"position": "learned", "sliding_window": 3, "sliding_layers": [1]}, {})],
)  # fmt: skip
def test_layer_follows_its_settings(settings: dict, more: dict) -> None:
    """ALiBi with the unwidened heads' scale; no rotation where it is not asked for; the window in its layers only."""
    layer = filled(**settings)
    x = torch.randn(sum(LENGTHS), 48, generator=torch.Generator().manual_seed(3))
    q, k, v = (torch.nn.functional.linear(x, w.weight).unflatten(-1, (-1, 8)) for w in (layer.wq, layer.wk, layer.wv))
    wanted = packed_dense([q, k, v], **more).flatten(1) @ layer.wo.weight.t().double()
    torch.testing.assert_close(layer(x, alibi_sequences(LENGTHS, SLOPES)).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel is for CUDA")
@pytest.mark.parametrize("window", [None, 4])
def test_cuda_kernel_with_shared_beginnings(window: int | None) -> None:
    """What the second document begins alike with is packed once: result and gradients are those of whole documents."""
    q, k, v = (t.cuda()[:11].requires_grad_() for t in qkv(torch.bfloat16))
    rows = [*range(7), *range(4), *range(7, 11)]  # documents of seven and eight tokens, four of which are the same
    sequences = Sequences.build((7, 8), FREQUENCIES.cuda(), shared=(0, 4))
    found = attend(q, k, v, sequences, window)
    wanted = attend(q[rows], k[rows], v[rows], Sequences.build((7, 8), FREQUENCIES.cuda()), window)
    kept = [*range(7), *range(11, 15)]
    torch.testing.assert_close(found, wanted[kept])
    weights = torch.randn_like(found)
    for ours, theirs in zip(
        *(torch.autograd.grad(out, (q, k, v), weights) for out in (found, wanted[kept])), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel is for CUDA")
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_cuda_kernel_with_window_and_alibi(window: int | None, alibi: bool) -> None:
    """In bf16, forward within 1 % of the largest value."""
    q, k, v = (t.cuda() for t in qkv(torch.bfloat16))
    sequences, parts = Sequences.build(LENGTHS, FREQUENCIES.cuda()), [q, k, v]
    if alibi:
        parts = append_alibi(*parts, alibi_channels(SLOPES.cuda(), sequences.positions, WIDTH, torch.bfloat16))
    found = attend(*parts, sequences, window, SCALE)[..., :WIDTH].cpu().double()
    wanted = packed_dense([q.cpu(), k.cpu(), v.cpu()], slopes=SLOPES if alibi else None, window=window)
    assert (found - wanted).abs().max() < 0.01 * wanted.abs().max()
