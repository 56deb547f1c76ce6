"""Settings: what follows from what, and how files spell it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from accessory.errors import ParallelError
from accessory.model.args import ModelArgs


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [
        (4096, 256, None, 11008),  # LLaMA-2 7B
        (5120, 256, None, 13824),  # 13B
        (8192, 4096, 1.3, 28672),  # 70B
        (4096, 1024, 1.3, 14336),  # Llama 3 8B
    ],
)
def test_hidden_width_of_published_models(dim: int, multiple_of: int, multiplier: float | None, width: int) -> None:
    """The MLP width follows from params.json as in Meta's code."""
    args = ModelArgs(dim=dim, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
    assert args.hidden_dim == width


def test_what_is_absent_follows_from_the_rest() -> None:
    """Key/value heads and head width default to the query's; a stated value stays."""
    args = ModelArgs(dim=512, n_heads=8)
    assert (args.n_kv_heads, args.head_dim) == (8, 64)
    args = ModelArgs(dim=512, n_heads=8, n_kv_heads=2, head_dim=96, hidden_dim=1000)
    assert (args.n_kv_heads, args.head_dim, args.hidden_dim) == (2, 96, 1000)


def test_metas_params_json_is_read() -> None:
    """LLaMA-2 70B's own file."""
    args = ModelArgs(
        **{"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
           "n_layers": 80, "norm_eps": 1e-5, "vocab_size": -1}
    )  # fmt: skip
    assert (args.hidden_dim, args.head_dim, args.rope_scaling) == (28672, 128, None)


def test_unknown_key_is_refused() -> None:
    """A misspelt setting is not ignored."""
    with pytest.raises(ValidationError, match="n_head"):
        ModelArgs(n_head=8)


def test_bare_number_scales_positions() -> None:
    """LLaMA2-Accessory's `rope_scaling: 0.25` multiplies positions, so frequencies are divided by 4."""
    scaling = ModelArgs(rope_scaling=0.25).rope_scaling
    assert (scaling.kind, scaling.factor) == ("linear", 4.0)


@pytest.mark.parametrize("key", ["kind", "rope_type", "type"])
def test_spellings_of_scaling(key: str) -> None:
    """Ours, today's and yesterday's Hugging Face key."""
    scaling = ModelArgs(rope_scaling={key: "llama3", "factor": 32.0, "rope_theta": 5e5}).rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_max_position_embeddings) == ("llama3", 32.0, 8192)


def test_default_scaling_is_none() -> None:
    """`rope_type: default` says that there is no scaling."""
    assert ModelArgs(rope_scaling={"rope_type": "default", "rope_theta": 1e4}).rope_scaling is None


def test_unknown_scaling_is_refused() -> None:
    """YaRN is not done."""
    with pytest.raises(ValidationError, match="yarn"):
        ModelArgs(rope_scaling={"rope_type": "yarn", "factor": 2.0})


def test_metas_switch_gives_llama31_constants() -> None:
    """`use_scaled_rope` stands for factor 8 over 8,192 positions, edges at 1 and 4 cycles."""
    scaling = ModelArgs(use_scaled_rope=True).rope_scaling
    assert scaling.model_dump() == {
        "kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


@pytest.mark.parametrize("scaling", [None, 0.5, {"rope_type": "llama3", "factor": 8.0}])
def test_what_is_saved_reads_back(scaling) -> None:
    """A checkpoint's config.json gives the same settings again."""
    args = ModelArgs(dim=512, n_heads=8, n_kv_heads=2, vocab_size=100, rope_scaling=scaling)
    assert ModelArgs(**args.model_dump()) == args


def test_sizes_that_divide_pass() -> None:
    """LLaMA-2 70B runs on up to eight ranks."""
    args = ModelArgs(dim=8192, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3, vocab_size=32000)
    for size in (1, 2, 4, 8):
        args.check_model_parallel(size)


@pytest.mark.parametrize(
    ("changes", "size", "fault"),
    [
        ({"n_heads": 6, "n_kv_heads": 6}, 4, "6 attention heads"),
        ({"n_kv_heads": 2}, 4, "2 key/value heads"),
        ({"hidden_dim": 36}, 4, "18 MLP width pairs"),
    ],
)
def test_sizes_that_do_not_divide_are_named(changes: dict, size: int, fault: str) -> None:
    """The message says what cannot be cut, and which sizes can be used."""
    args = ModelArgs(**{"dim": 48, "n_heads": 8, "n_kv_heads": 8, "hidden_dim": 64, "vocab_size": 96, **changes})
    with pytest.raises(ParallelError, match=f"--model_parallel_size {size} does not divide .*{fault}.*do: 1, 2"):
        args.check_model_parallel(size)
