"""Models that transformers loaded are used where they lie, and what cannot be used is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from accessory.errors import CheckpointError, ConfigError
from accessory.hugging_face import QSTConfig, QSTForCausalLM, QSTLlamaForCausalLM, QSTOPTForCausalLM
from accessory.quant import PackedWeight
from tests.conftest import VOCABULARY
from tests.hugging_face.loaded_models import CLASSES, SIDE, TOKENS, loaded, moved


@pytest.mark.parametrize("family", CLASSES)
def test_bytes_are_used_where_they_lie(made, family: str) -> None:
    """Codes, statistics, embedding and head."""
    model, theirs = made(family)
    modules = [module.weight for module in theirs.modules() if hasattr(module, "weight")]
    states = [weight.quant_state for weight in modules if hasattr(weight, "quant_state")]
    their_memory = {weight.data_ptr() for weight in modules}
    their_memory |= {t.data_ptr() for s in states for t in (s.absmax, s.state2.absmax)}
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    assert len(packed) == len(states) == {"llama": 14, "opt": 12}[family]
    for weight in packed:
        assert {p.data_ptr() for p in (weight.codes, weight.scales, weight.nested_scales)} <= their_memory
    assert model.decoder.tok_embeddings.weight.data_ptr() in their_memory
    assert model.decoder.head_weight.data_ptr() in their_memory


def test_a_model_that_was_asked_before(made, bases) -> None:
    """On some CPUs bitsandbytes has by then laid its bytes in another order, and tokens may have been added."""
    fresh, theirs = made()[0], loaded(bases["llama"])
    theirs(TOKENS[None])
    theirs.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    config = transformers.AutoConfig.from_pretrained(bases["llama"])
    model = QSTLlamaForCausalLM(theirs, config, QSTConfig(**SIDE))
    found = model(TOKENS[None]).logits
    assert found.shape == (1, 40, VOCABULARY + 3)
    torch.testing.assert_close(found[..., :VOCABULARY], fresh(TOKENS[None]).logits, rtol=1e-6, atol=1e-6)


def test_fused_matrices_are_taken_apart(tmp_path: Path) -> None:
    """Of any family that is known."""
    config = transformers.BloomConfig(hidden_size=64, n_layer=1, n_head=4, vocab_size=512, initializer_range=0.2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    theirs = loaded(tmp_path)
    model = QSTForCausalLM(theirs, config, QSTConfig(r=4))
    with torch.no_grad():
        expected = theirs.train()(TOKENS[None]).logits
    assert (model(TOKENS[None]).logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_in_bf16(made, bases) -> None:
    """Computed in what bitsandbytes was told to compute in, whatever autocast says."""
    wide = moved(made()[0])
    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = wide(TOKENS[None], labels=TOKENS[None])[:]
    for value, expected in zip(in_autocast, wide(TOKENS[None], labels=TOKENS[None])[:], strict=True):
        assert torch.equal(value, expected)
    theirs = loaded(bases["llama"], dtype=torch.bfloat16)
    model = QSTLlamaForCausalLM(theirs, theirs.config, QSTConfig(**SIDE))
    assert model.decoder.tok_embeddings.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    out = model(TOKENS[None], labels=TOKENS[None])
    with torch.no_grad():
        expected = theirs.train()(TOKENS[None], labels=TOKENS[None])
    assert out.hidden.dtype == torch.bfloat16
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=2e-2)
    assert (out.logits - expected.logits).abs().max() < 5e-2 * expected.logits.abs().max()


def test_unknown_models_are_refused(bases) -> None:
    """By their type, with those that are known; so is a model of another family, and one cut over devices."""
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=32))
    with pytest.raises(CheckpointError, match=r"GPT2LMHeadModel: model_type 'gpt2' is not supported\. Known: llama,"):
        QSTForCausalLM(gpt2, gpt2.config, QSTConfig())
    opt = loaded(bases["opt"], bits=False)
    with pytest.raises(ConfigError, match=r"takes models of the family llama; .*'opt'.*: use QSTOPTForCausalLM"):
        QSTLlamaForCausalLM(opt, opt.config, QSTConfig(r=4))
    opt.lm_head.to("meta")
    with pytest.raises(ConfigError, match="lies on cpu and meta; expected one device"):
        QSTOPTForCausalLM(opt, opt.config, QSTConfig(r=4))
