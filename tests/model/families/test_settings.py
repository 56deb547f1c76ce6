"""Each setting of transformers' configurations changed in turn: computed as transformers does, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from accessory.errors import CheckpointError
from accessory.generate import next_token_logits
from accessory.parallel.groups import Layout
from tests.model.families.matrix import BLOOM, GATED, GLM, GROUPED, OPT, known
from tests.model.families.subject import IDS, read_decoder

MODELS: dict[str, dict[str, Any]] = {
    "llama": GROUPED, "mistral": GROUPED, "qwen2": GROUPED, "qwen3": GROUPED, "internlm3": GROUPED, "glm": GLM,
    "glm4": GLM, "gpt_neox": GATED, "bloom": BLOOM, "opt": OPT | {"word_embed_proj_dim": 128},
}  # fmt: skip
TOLERANCE = 1e-4  # of the largest logit; measured: 1e-5
WINDOW = {"sliding_window": 5, "use_sliding_window": True}
REFUSED = {
    ("opt", "layer_norm_elementwise_affine"), ("bloom", "apply_residual_connection_post_layernorm"),
    ("gpt_neox", "head_dim"),
}  # fmt: skip


def changes(config: transformers.PretrainedConfig) -> Iterator[dict[str, Any]]:
    """Every switch turned, every fraction moved, and what else decides how heads, windows and positions compute."""
    for key, value in config.to_dict().items():
        if isinstance(value, bool):
            yield {key: not value}
        elif isinstance(value, float):
            yield {key: 100 * value if value < 1e-3 else value / 2 + 0.2}
    yield from (
        {"head_dim": 16},
        {"num_key_value_heads": 1},
        {"hidden_act": "gelu_new"},
        {"activation_function": "silu"},
    )
    yield from (
        WINDOW,
        WINDOW | {"max_window_layers": 1},
        WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    )
    for rope in ({"rope_type": "linear", "factor": 2.0}, {"rope_type": "default", "partial_rotary_factor": 0.25}):
        yield {"rope_parameters": {"rope_theta": 500.0, **rope}}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_setting(name: str, layout: Layout, tmp_path: Path) -> None:
    computed, refused = 0, set()
    for i, change in enumerate(changes(transformers.AutoConfig.for_model(name, **MODELS[name]))):
        directory = tmp_path / str(i)
        try:
            known(name, **MODELS[name] | change)(directory)
            model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
            with torch.no_grad():
                expected = model(IDS[None]).logits[0]
        except (AttributeError, TypeError, ValueError, RuntimeError, StrictDataclassError):
            continue  # what transformers itself cannot compute
        try:
            decoder, _ = read_decoder(directory, layout)
        except CheckpointError as error:
            assert next(iter(change)) in str(error)
            refused.add((name, next(iter(change))))
            continue
        with torch.no_grad():
            found = next_token_logits(decoder, decoder(IDS, decoder.sequences((len(IDS),))))
        assert (found - expected).abs().max() < TOLERANCE * expected.abs().max(), change
        computed += 1
    assert computed > 12 and refused == {pair for pair in REFUSED if pair[0] == name}
