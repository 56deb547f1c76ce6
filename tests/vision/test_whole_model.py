"""A model that sees images as a whole, beside transformers' parts put together in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from accessory import MetaModel
from accessory.data.batch import PackedBatch
from accessory.generate import next_token_logits
from tests.vision.seeing import Reference, documents, packed, write_stage_one

transformers = pytest.importorskip("transformers", reason="the extra vision is not installed")
pytest.importorskip("PIL", reason="the extra vision is not installed")


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, blip2: tuple) -> Path:
    """Upstream's files of a whole llama_qformerv2."""
    directory = tmp_path_factory.mktemp("upstream") / "stage_one"
    directory.mkdir()
    write_stage_one(directory, tiny_base, blip2[1])
    return directory


def opened(kind: str, tiny_base: Path, stage_one: Path, encoder: Path, **how) -> MetaModel:
    """A model with a part of that kind, to be trained in fp32."""
    if kind == "llama_qformerv2_peft":
        beside = {"llama_config": [stage_one.parent / "params.json", {"lora_rank": 4, "vision_tuning": True}],
                  "tokenizer_path": stage_one.parent}  # fmt: skip
        return MetaModel.from_pretrained(stage_one, llama_type=kind, dtype="fp32", train=True, **beside, **how)
    settings = {"vision_tuning": True} if kind.endswith("_peft") else {}
    return MetaModel.from_pretrained(
        tiny_base, llama_type=kind, vision_path=encoder, dtype="fp32", train=True, llama_config=settings, **how
    )


@pytest.mark.parametrize("kind", ["llama_qformerv2", "llama_qformerv2_peft", "llama_peft"])
def test_logits_and_gradients(kind: str, tiny_base: Path, stage_one: Path, blip2: tuple, clip: tuple) -> None:
    """Of a Q-Former from a directory and from upstream's file, and of CLIP; of documents packed, shared, and alone."""
    encoder, path = clip if kind == "llama_peft" else blip2
    model = opened(kind, tiny_base, stage_one, path)
    behind = {name.removeprefix("llma."): p for name, p in model.named_parameters()
              if name.removeprefix("llma.").split(".")[0] in model.vision.projection}  # fmt: skip
    language = transformers.LlamaForCausalLM.from_pretrained(tiny_base)
    reference = Reference(model.vision.name, encoder, language, behind)
    several = documents(model.vision.place)
    ours, wanted = model(packed(*several)), sum(map(reference.loss, several))
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-6)
    alone = sum(model(packed(each)) for each in several)
    assert alone.item() == pytest.approx(ours.item(), rel=1e-6)
    again = [several[0], several[0]._replace(tokens=np.array([*several[0].tokens[:-1], 7]), id=9)]
    shared = PackedBatch.pack(again)
    assert max(shared.shared) > model.vision.place.rows and len(shared.insets) == 1  # the image is there once
    assert model(shared).item() == pytest.approx(sum(model(packed(each)).item() for each in again), rel=1e-6)
    for each in several:
        logits = next_token_logits(model.llma, model.hidden(packed(each)))
        torch.testing.assert_close(logits.double(), reference.logits(each), rtol=1e-5, atol=1e-5)
    ours.backward()
    wanted.backward()
    assert set(behind) == {name.removeprefix("llma.") for name in model.get_trainable_params()} & set(behind)
    for name, parameter in behind.items():
        _close(parameter.grad, reference.state[name].grad, name)
    _close(model.llma.norm.weight.grad, language.model.norm.weight.grad, "norm")
    frozen = getattr(model.llma, model.vision.encoder)
    assert not any(p.requires_grad for p in frozen.parameters())
    if kind == "llama_qformerv2":
        _close(model.llma.tok_embeddings.weight.grad, language.model.embed_tokens.weight.grad, "embedding")


def test_ranks(stage_one: Path, tiny_base: Path, blip2: tuple, clip: tuple, torchrun, tmp_path: Path) -> None:
    """Two that share a model and its pictures, and two of which one has none: gradients are those of one process.

    Of rows behind BOS and before it, of what is added to prefixes, whose gates are open, and of all that is not frozen.
    """
    gates = {"model": {"llma.prefix_gate": torch.linspace(-1, 1, 4)[None]}}
    (part := tmp_path / "part").mkdir()
    torch.save(gates, part / "consolidated.00-of-01.model.pth")
    adapter = {"prefix_layers": 1, "prefix_len": 3, "v_embed_dim": 32, "v_depth": 2, "v_num_heads": 2,
               "trainable_mode": "mm_stage1", "lora_rank": 4}  # fmt: skip
    models = {
        "rows": {
            "pretrained_path": [str(stage_one)], "vision_path": None, "llama_type": "llama_qformerv2_peft",
            "llama_config": [str(stage_one.parent / "params.json"), {"lora_rank": 4, "vision_tuning": True}],
            "tokenizer_path": str(stage_one.parent),
        },
        "prefixes": {
            "pretrained_path": [str(tiny_base), str(part)], "vision_path": str(clip[1]), "llama_config": [adapter],
            "llama_type": "llama_adapter", "tokenizer_path": str(tiny_base),
        },
        "all of it": {
            "pretrained_path": [str(tiny_base)], "vision_path": str(blip2[1]), "llama_config": [],
            "llama_type": "llama_qformerv2", "tokenizer_path": str(tiny_base),
        },
        "patches": {
            "pretrained_path": [str(tiny_base)], "vision_path": str(clip[1]), "llama_config": [{"vision_tuning": True}],
            "llama_type": "llama_peft", "tokenizer_path": str(tiny_base),
        },
    }  # fmt: skip
    told = {"prefixes": "visual_query", "patches": "clip_proj.weight"}
    (tmp_path / "models.json").write_text(json.dumps(models))
    for name, given in models.items():
        model = MetaModel.from_pretrained(**given, dtype="fp32", train=True)
        several = documents(model.vision.place)
        for which, chosen in (("all", several), ("two", several[:2])):
            model.zero_grad()
            model(packed(*chosen)).backward()
            found = {key.removeprefix("llma."): p.grad.clone() for key, p in model.get_trainable_params().items()}
            save_file(found, tmp_path / f"{name}-{which}.safetensors")
        assert found[told.get(name, "start_img")].norm() > 0
    done = torchrun(2, Path(__file__).parent / "ranks_worker.py", tmp_path / "models.json")
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert done.stdout.count("OK") == 2


def _close(ours: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item(), msg=name)
