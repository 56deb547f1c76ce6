"""`from_pretrained(..., train=True)`: a loop of one's own has the engine's losses; what it saves is a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accessory import FinetuneConfig, MetaModel, finetune
from accessory.errors import CheckpointError, ConfigError, ParallelError
from accessory.parallel.groups import Layout
from tests.conftest import DATA

LORA = {"lora_rank": 4, "lora_alpha": 8}
HOW = {"quant": True, "llama_type": "llama_peft", "llama_config": LORA}
LR, STEPS, SEED = 3e-3, 5, 2


def trained(base: Path, steps: int = STEPS, **changes) -> tuple[MetaModel, list[float]]:
    """A model trained by the loop of docs/python.md, and its losses."""
    model = MetaModel.from_pretrained(base, train=True, dtype="fp32", seed=SEED, **{**HOW, **changes})
    optimizer = torch.optim.AdamW(model.get_trainable_params().values(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for batch in model.batches(model.corpus([str(DATA)], max_words=128), batch_size=4, epochs=2, seed=SEED):
        loss = model(batch) / batch.supervised
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) == steps:
            break
    return model, losses


def test_losses_are_the_engines(tiny_base: Path, tmp_path: Path) -> None:
    """On the same documents; what is trained has the engine's names, and what it saved is the engine's to rounding."""
    (tmp_path / "lora.json").write_text(json.dumps(LORA))
    how = {**HOW, "llama_config": tmp_path / "lora.json", "data_config": str(DATA), "output_dir": tmp_path / "out"}
    finetune(
        FinetuneConfig(
            pretrained_path=str(tiny_base), precision="fp32", only_save_trainable=True, device="cpu", batch_size=4,
            accum_iter=1, max_steps=STEPS, lr=LR, lr_schedule="constant", warmup_epochs=0, clip_grad=1.0,
            weight_decay=0.0, max_words=128, seed=SEED, **how,
        )
    )  # fmt: skip
    log = [json.loads(line)["loss"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    model, losses = trained(tiny_base)
    assert losses == pytest.approx(log, rel=1e-6) and losses[-1] < losses[0]
    model.save(tmp_path / "own")
    (theirs,), ours = (tmp_path / "out").glob("epoch*/trainable.safetensors"), tmp_path / "own/trainable.safetensors"
    expected, found = load_file(theirs), load_file(ours)
    assert found.keys() == expected.keys() == {name[5:] for name in model.get_trainable_params()}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


def test_what_was_saved_answers_alone(tiny_base: Path, tmp_path: Path) -> None:
    """Its files name base, storage and layout of questions; saved again it replaces itself, and nothing else."""
    model, _ = trained(tiny_base, steps=2)
    for corpus in (None, model.corpus(DATA, max_words=128)):
        model.save(tmp_path / "own", corpus)
        assert MetaModel.from_pretrained(tmp_path / "own").prompt_layouts == (("alpaca",) if corpus else ())
    again = MetaModel.from_pretrained(str(tmp_path / "own"), dtype="fp32")
    tokens = torch.arange(48) * 7 % 500
    assert torch.equal(again.logits(tokens, (40, 8)), model.eval().logits(tokens, (40, 8)))
    assert again.get_trainable_params().keys() == model.get_trainable_params().keys()
    assert not any(parameter.requires_grad for parameter in again.parameters())
    further = MetaModel.from_pretrained(tmp_path / "own", train=True, dtype="fp32")  # goes on from there
    assert torch.equal(further.eval().logits(tokens, (40, 8)), again.logits(tokens, (40, 8)))
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match="mine: is there already; expected a new directory, or a checkpoint to"):
        model.save(tmp_path / "mine")


def test_a_fully_trained_model_is_saved_whole(tiny_base: Path, tmp_path: Path) -> None:
    """What is trained are all of its weights, in fp32."""
    model, losses = trained(tiny_base, steps=2, quant=False, llama_type="llama", llama_config=())
    assert losses[1] < losses[0]
    model.save(tmp_path / "own")
    assert (tmp_path / "own" / "model.safetensors").is_file()
    again = MetaModel.from_pretrained(tmp_path / "own", dtype="fp32")
    tokens = torch.arange(48) * 7 % 500
    assert torch.equal(again.logits(tokens, (40, 8)), model.eval().logits(tokens, (40, 8)))
    assert again.get_trainable_params().keys() == dict(again.named_parameters()).keys()


def test_what_cannot_be(tiny_base: Path, tmp_path: Path) -> None:
    """A model in training keeps its part; a cut one needs the engine; LoRA that nobody trained is not made up."""
    model = MetaModel.from_pretrained(tiny_base, train=True, **HOW)
    with pytest.raises(ConfigError, match=r"use\(\) is for a model that is asked"):
        model.use(None)
    with pytest.raises(ConfigError, match=r"save\(\) writes a model of MetaModel\.from_pretrained"):
        MetaModel(model.llma, model.tokenizer, 64).save(tmp_path / "own")
    with pytest.raises(ParallelError, match="train=True takes a model whole on its rank"):
        MetaModel.from_pretrained(tiny_base, train=True, layout=Layout(mp_size=2))
    with pytest.raises(CheckpointError, match=r"lora_a\.weight.* are missing"):
        MetaModel.from_pretrained(tiny_base, **HOW)
    with pytest.raises(ConfigError, match="--quant with --llama_type llama: "):
        MetaModel.from_pretrained(tiny_base, train=True, quant=True)
