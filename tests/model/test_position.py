"""Rotary embedding against transformers' and formulas, in both layouts, and ALiBi's slopes and channels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from accessory.kernels.plain import rotary as plain_rotary
from accessory.model.args import ModelArgs
from accessory.model.position import (
    alibi_channels,
    alibi_slopes,
    append_alibi,
    rotary_frequencies,
    rotate,
    rotations_at,
)

SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def halves(x: Tensor) -> Tensor:
    """Meta's neighbouring pairs -> Hugging Face's channel halves."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize("kind", SCALINGS)
def test_equals_transformers(kind: str) -> None:
    """Frequencies and rotated vectors of all scalings, after the change of layout, out to position 199."""
    theta, width = 5000.0, 32
    config = LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, head_dim=width, max_position_embeddings=256,
        rope_parameters={"rope_theta": theta, **SCALINGS[kind]},
    )  # fmt: skip
    theirs = LlamaRotaryEmbedding(config)
    args = ModelArgs(dim=2 * width, n_heads=2, rope_theta=theta, rope_scaling=SCALINGS[kind])
    frequencies = rotary_frequencies(args)
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=1e-6, atol=0)

    x, positions = random(200, 2, width), torch.arange(200)
    cos, sin = theirs(x, positions[None])
    wanted, _ = apply_rotary_pos_emb(halves(x).transpose(0, 1)[None], halves(x).transpose(0, 1)[None], cos, sin)
    found = halves(rotate(x, rotations_at(frequencies, positions)))
    torch.testing.assert_close(found, wanted[0].transpose(0, 1), rtol=1e-5, atol=1e-4)


def test_llama3_scaling_has_its_three_parts() -> None:
    """Fast pairs stay, slow ones are divided by the factor, the edge between is monotone: not all the same branch."""
    base = rotary_frequencies(ModelArgs(dim=64, n_heads=1))
    ratio = rotary_frequencies(ModelArgs(dim=64, n_heads=1, rope_scaling=SCALINGS["llama3"])) / base
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(1 / 8)
    assert ((ratio > 0.13) & (ratio < 0.99)).any()
    assert (ratio.diff() <= 0).all()


def test_gradient_is_the_functions() -> None:
    """Finite differences in float64."""
    rotations = rotations_at(torch.tensor([1.0, 0.1], dtype=torch.float64), torch.tensor([0, 3, 5]))
    assert rotations.dtype == torch.complex128
    assert torch.autograd.gradcheck(
        lambda x: rotate(x, rotations), (random(3, 2, 4, dtype=torch.float64).requires_grad_(),)
    )


def test_formula_of_one_pair() -> None:
    """(1, 0) at position p rotates to (cos p f, sin p f)."""
    found = rotate(torch.tensor([[[1.0, 0.0]]]), rotations_at(torch.tensor([0.5]), torch.tensor([3])))
    torch.testing.assert_close(found[0, 0], torch.tensor([math.cos(1.5), math.sin(1.5)]))


def test_scores_depend_on_distance_alone() -> None:
    """q at 9 against k at 4 equals q at 25 against k at 20."""
    frequencies = rotary_frequencies(ModelArgs(dim=32, n_heads=1))
    q, k = random(1, 1, 32), random(2, 1, 32)[1:]

    def score(at_q: int, at_k: int) -> Tensor:
        rotated = (rotate(x, rotations_at(frequencies, torch.tensor([at]))) for x, at in ((q, at_q), (k, at_k)))
        return torch.mul(*rotated).sum()

    torch.testing.assert_close(score(9, 4), score(25, 20))
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3


def test_bf16_is_turned_in_fp32() -> None:
    """A bf16 vector loses only its final rounding, at a far position too, both ways."""
    frequencies = rotary_frequencies(ModelArgs(dim=32, n_heads=1))
    rotations = rotations_at(frequencies, torch.tensor([3999]))
    x = random(1, 1, 32, dtype=torch.float32).bfloat16()
    leaf = x.clone().requires_grad_()
    y = rotate(leaf, rotations)
    y.backward(x)
    torch.testing.assert_close(y, rotate(x.float(), rotations).bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(leaf.grad, rotate(x.float(), rotations.conj()).bfloat16(), rtol=0, atol=0)


def test_nothing_but_the_angles_is_kept() -> None:
    """The rotation saves the shared factors and no vector."""
    rotations = rotations_at(torch.tensor([0.5]), torch.arange(4))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotate(random(4, 3, 2).requires_grad_(), rotations)
    assert [t.data_ptr() for t in saved] == [rotations.data_ptr()]


def rotated(x: Tensor, frequencies: Tensor, positions: list[int], layout: str) -> Tensor:
    """The rotation of x [T, heads, E] written out, a token and a pair of channels at a time."""
    out, half = x.clone(), len(frequencies)
    for token, at in enumerate(positions):
        for i, frequency in enumerate(frequencies.tolist()):
            a, b = (2 * i, 2 * i + 1) if layout == "pairs" else (i, i + half)
            cosine, sine = math.cos(at * frequency), math.sin(at * frequency)
            out[token, :, a] = x[token, :, a] * cosine - x[token, :, b] * sine
            out[token, :, b] = x[token, :, b] * cosine + x[token, :, a] * sine
    return out


@pytest.mark.parametrize("rotary_dim", [8, 4])
@pytest.mark.parametrize("layout", ["pairs", "halves"])
def test_layouts_and_partial_rotation(layout: str, rotary_dim: int) -> None:
    """Value against the formula, and gradient by finite differences, in float64; what is not rotated passes through."""
    positions = [0, 1, 7]
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.02][: rotary_dim // 2], dtype=torch.float64)
    rotations, x = rotations_at(frequencies, torch.tensor(positions)), random(3, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, rotations, layout), rotated(x, frequencies, positions, layout))
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotations, layout), (x.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["pairs", "halves"])
def test_turning_piece_by_piece_changes_nothing(monkeypatch, layout: str, dtype: torch.dtype) -> None:
    """Pieces of three tokens, the last of them shorter."""
    rotations, x = rotations_at(torch.tensor([1.0, 0.3]), torch.arange(11)), random(11, 2, 8).to(dtype)
    whole = rotate(x, rotations, layout)
    monkeypatch.setattr(plain_rotary, "_CHUNK", 3 * 2 * 8)
    assert torch.equal(rotate(x, rotations, layout), whole)


def test_halves_in_bf16_are_turned_in_fp32() -> None:
    """Only the final rounding is lost, both ways."""
    rotations = rotations_at(rotary_frequencies(ModelArgs(dim=32, n_heads=1)), torch.tensor([3999]))
    x = random(1, 1, 32).bfloat16()
    leaf = x.clone().requires_grad_()
    y = rotate(leaf, rotations, "halves")
    y.backward(x)
    torch.testing.assert_close(y, rotate(x.float(), rotations, "halves").bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(leaf.grad, rotate(x.float(), rotations.conj(), "halves").bfloat16(), rtol=0, atol=0)


def test_frequencies_of_a_part_of_a_head() -> None:
    """The exponents run over what is rotated; a model that is not rotary has none; dynamic scaling waits."""
    found = rotary_frequencies(ModelArgs(dim=64, n_heads=1, rotary_dim=8))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.1, 0.01, 0.001]))
    assert rotary_frequencies(ModelArgs(dim=64, n_heads=1, position="alibi")).numel() == 0
    dynamic = ModelArgs(dim=64, n_heads=1, rotary_dim=8, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert torch.equal(rotary_frequencies(dynamic), found)


def papers_slopes(heads: int) -> list[float]:
    """Press et al. 2022, as their own code has it."""
    if math.log2(heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return [start * start**i for i in range(heads)]
    below = 2 ** math.floor(math.log2(heads))
    return papers_slopes(below) + papers_slopes(2 * below)[0::2][: heads - below]


@pytest.mark.parametrize("heads", [1, 2, 8, 12, 16, 25, 32, 40, 112])
def test_alibi_slopes(heads: int) -> None:
    """Powers of two, and what falls between them."""
    wanted = torch.tensor(papers_slopes(heads), dtype=torch.float64)
    torch.testing.assert_close(alibi_slopes(heads), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2**-22), (torch.float16, 2**-20), (torch.float32, 1e-7)]
)
def test_alibi_channels_lose_nothing(dtype: torch.dtype, tolerance: float) -> None:
    """Summed exactly they are slope x position x sqrt(E), at the end of a long document and in a narrow dtype too."""
    slopes, positions = alibi_slopes(40), torch.tensor([0, 1, 255, 256, 2047, 40_001, 65_535])
    query, key = alibi_channels(slopes, positions, 96, dtype)
    assert query.dtype == key.dtype == dtype
    found = torch.einsum("hc,tc->th", query.double(), key[:, 0].double())
    wanted = positions[:, None] * slopes * math.sqrt(96)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=0)


def test_leaning_leaves_the_heads_as_they_are() -> None:
    """Channels come behind; values get zeros."""
    channels = alibi_channels(alibi_slopes(4), torch.arange(3), 16, torch.float32)
    q, k, v = random(3, 4, 16), random(3, 2, 16), random(3, 2, 16)
    wide = append_alibi(q, k, v, channels)
    for narrow, wider in zip((q, k, v), wide, strict=True):
        assert torch.equal(wider[..., :16], narrow)
    assert not wide[2][..., 16:].any()
    assert wide[0].shape[-1] % 8 == 0
