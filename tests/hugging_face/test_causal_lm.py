"""Side tuning of models that transformers loaded: their logits, the losses of our engine, answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from accessory.meta import MetaModel
from tests.hugging_face.loaded_models import CLASSES, TOKENS, batch, moved
from tests.hugging_face.training import (
    ACCUMULATED,
    CLIP,
    STEPS,
    collated,
    documents,
    optimizer_of,
    trainer,
)


def test_only_the_side_network_is_trained(made) -> None:
    """By its parameters, its state dict and the count of the published form."""
    model, _ = made()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(model.state_dict()) == trained
    assert not any(name.startswith(("decoder.layers", "decoder.tok", "decoder.output")) for name in trained)
    again, _ = made()
    moved(again)
    assert not again.load_state_dict(model.state_dict()).missing_keys
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="upsample"):
        again.load_state_dict({k: v for k, v in model.state_dict().items() if "upsample" not in k})


@pytest.mark.parametrize("bits", [True, False], ids=["nf4", "plain"])
@pytest.mark.parametrize("family", CLASSES)
def test_untrained_logits_are_the_bases(made, bases, family: str, bits: bool) -> None:
    """To the bit those of our decoder alone, and transformers' to rounding."""
    model, theirs = made(family, bits)
    ours = MetaModel.from_pretrained(bases[family], dtype="fp32", quant=bits).logits(TOKENS, (40,))
    found = model(TOKENS[None]).logits[0]
    assert torch.equal(found, ours)
    with torch.no_grad():
        expected = theirs.train()(TOKENS[None]).logits[0]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tail"), [("llama", 1), ("opt", 0)])
def test_own_loop_has_the_engines_losses(made, bases, engines_losses, family: str, tail: int) -> None:
    """On the same documents, padded in any micro-batches; also with LoRA in the base's last block."""
    model, losses = made(family, tail=tail)[0].train(), []
    optimizer = optimizer_of(model)
    for rows in documents(bases[family]):
        supervised = sum(int((row["labels"][1:] >= 0).sum()) for row in rows)
        parts = [model(**collated(part), num_items_in_batch=supervised).loss for part in (rows[:3], rows[3:])]
        sum(parts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(parts).item())
        assert model(**collated(rows)).loss.item() < losses[-1]
    assert losses == pytest.approx(engines_losses(family, tail), rel=1e-5)


@pytest.mark.slow
def test_trainer_has_the_engines_losses(made, bases, engines_losses, tmp_path: Path) -> None:
    """Its checkpoints hold what is trained, and it goes on from one with the same losses."""
    whole = trainer(made()[0], bases["llama"], tmp_path)
    whole.train()
    each = torch.tensor(whole.losses).view(STEPS, ACCUMULATED).sum(1)
    assert each.tolist() == pytest.approx(engines_losses("llama"), rel=1e-5)
    assert whole.evaluate()["eval_loss"] < each[0]
    resumed = trainer(made()[0], bases["llama"], tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.losses == whole.losses[2 * ACCUMULATED :]
    names = set(transformers.trainer.safetensors.torch.load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    assert names == {name for name, p in whole.model.named_parameters() if p.requires_grad}


def test_trainer_on_two_processes(bases, engines_losses, torchrun, tmp_path: Path) -> None:
    """With its data parallelism the losses are the same again."""
    worker, ranks = Path(__file__).with_name("side_trainer_worker.py"), 2
    done = torchrun(ranks, worker, bases["llama"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    each = [json.loads((tmp_path / f"losses{rank}.json").read_text()) for rank in range(ranks)]
    # Each rank's loss is multiplied by their number, because gradients are averaged.
    means = [sum(losses) / ranks for losses in zip(*each, strict=True)]
    assert means == pytest.approx(engines_losses("llama"), rel=1e-5)


def test_answers_are_transformers(made) -> None:
    """Greedy ones of the untrained model; training goes on afterwards as if nobody had asked."""
    model, theirs = made()
    ids, mask, _ = batch([(row, row) for row in (TOKENS[:9], TOKENS[3:7])], "left")
    found = model.train().generate(ids, mask, max_new_tokens=6)
    assert model.training
    expected = theirs.train().generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)
    model(ids, mask, ids).loss.backward()
    end = int(found[0, 11])
    cut = model.generate(ids, mask, max_new_tokens=6, eos_token_id=end, pad_token_id=3)
    first = found[0, 9:].tolist().index(end)
    assert cut[0, 9:].tolist()[: first + 1] == found[0, 9:].tolist()[: first + 1]
    assert set(cut[0, 9 + first + 1 :].tolist()) <= {3}
    drawn = [model.generate(ids, mask, max_new_tokens=6, do_sample=True, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
