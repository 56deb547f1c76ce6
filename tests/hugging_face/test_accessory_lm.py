"""A `MetaModel` inside transformers: Trainer has our engine's losses, `generate` gives transformers' own answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from accessory import FinetuneConfig, MetaModel, finetune
from accessory.data.corpus import build_corpus
from accessory.data.order import GlobalOrder
from accessory.errors import ConfigError, DataError
from accessory.hugging_face import AccessoryForCausalLM
from accessory.parallel import groups
from accessory.parallel.groups import Layout
from accessory.tokenizer import open_tokenizer
from tests.conftest import DATA
from tests.hugging_face.loaded_models import TOKENS, batch, loaded
from tests.hugging_face.training import CLIP, LONGEST, LR, Recording, collated

LORA = {"lora_rank": 4, "lora_alpha": 8}  # beside norms and biases
HOW = {"quant": True, "dtype": "fp32", "llama_type": "llama_peft", "llama_config": LORA, "seed": 1}
STEPS, BATCH = 5, 4


@pytest.fixture(scope="module", autouse=True)
def layout() -> Iterator[Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()


def engines_losses(base: Path, folder: Path) -> list[float]:
    """Of as many steps of our engine."""
    (folder / "lora.json").write_text(json.dumps(LORA))
    finetune(
        FinetuneConfig(
            pretrained_path=base, data_config=DATA, output_dir=folder / "out", llama_type="llama_peft", quant=True,
            llama_config=folder / "lora.json", precision="fp32", only_save_trainable=True, device="cpu",
            batch_size=BATCH, accum_iter=1, max_steps=STEPS, lr=LR, lr_schedule="constant", warmup_epochs=0,
            clip_grad=CLIP, weight_decay=0.0, max_words=LONGEST, seed=1,
        )
    )  # fmt: skip
    return [json.loads(line)["loss"] for line in (folder / "out" / "log.jsonl").read_text().splitlines()]


def trainer(base: Path, folder: Path, **changes) -> Recording:
    """Trains a fresh LoRA on the engine's documents."""
    corpus = build_corpus(DATA, open_tokenizer(base), max_words=LONGEST)
    order, rows = GlobalOrder(corpus, batch_size=BATCH, accum_iter=1, seed=1), []
    for number in (number for step in range(STEPS) for number in order.global_ids(0, step)):
        tokens, following = (torch.from_numpy(part.astype("int64")) for part in corpus.document(number))
        rows.append({"input_ids": tokens, "labels": torch.cat([tokens[:1], following[:-1]])})
    settings = {
        "per_device_train_batch_size": BATCH, "max_steps": STEPS, "learning_rate": LR, "lr_scheduler_type": "constant",
        "adam_beta2": 0.95, "max_grad_norm": CLIP, "use_cpu": True, "save_steps": 3, "report_to": [],
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(folder, **{**settings, **changes})
    model = AccessoryForCausalLM.from_pretrained(base, **HOW)
    return Recording(model, arguments, data_collator=collated, train_dataset=rows)


@pytest.mark.slow
def test_trainer_has_the_engines_losses(tiny_base: Path, tmp_path: Path) -> None:
    """Its checkpoints are trained parts of ours, which answer alone, and it goes on from one with the same losses."""
    whole = trainer(tiny_base, tmp_path)
    whole.train()
    assert whole.losses == pytest.approx(engines_losses(tiny_base, tmp_path), rel=1e-5)
    assert whole.losses[-1] < whole.losses[0]
    trained = {f"model.{name}" for name in whole.model.model.get_trainable_params()}
    assert set(whole.model.state_dict()) == trained == {n for n, p in whole.model.named_parameters() if p.requires_grad}
    asked = MetaModel.from_pretrained(tmp_path / "checkpoint-5", dtype="fp32")
    wanted = whole.model.eval().model.logits(TOKENS, (40,))
    assert torch.equal(asked.logits(TOKENS, (40,)), wanted)
    assert torch.equal(whole.model(TOKENS[None]).logits[0], wanted)
    resumed = trainer(tiny_base, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.losses == whole.losses[3:]


def test_trainer_on_two_processes(tiny_base: Path, torchrun, tmp_path: Path) -> None:
    """With its data parallelism the losses are those of one process."""
    done = torchrun(2, Path(__file__).with_name("trainer_worker.py"), tiny_base, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    each = [json.loads((tmp_path / f"losses{rank}.json").read_text()) for rank in range(2)]
    # Each rank's loss is multiplied by their number, because gradients are averaged.
    means = [sum(losses) / 2 for losses in zip(*each, strict=True)]
    assert means == pytest.approx(engines_losses(tiny_base, tmp_path), rel=1e-5)


@pytest.mark.parametrize("how", [
    {}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 9}, {"repetition_penalty": 1.5},
    {"use_cache": False},
], ids=str)  # fmt: skip
def test_answers_are_transformers(tiny_base: Path, how: dict) -> None:
    """To prompts of two lengths; what a beam or a draw chooses depends on all logits."""
    ours = AccessoryForCausalLM.from_pretrained(tiny_base, train=False, dtype="fp32")
    ids, mask, _ = batch([(row, row) for row in (TOKENS[:9], TOKENS[3:7])], "left")
    found = []
    for model in (ours, loaded(tiny_base, bits=False)):
        torch.manual_seed(0)
        found.append(model.generate(ids, attention_mask=mask, max_new_tokens=12, eos_token_id=1, pad_token_id=1, **how))
    assert torch.equal(*found)


def test_a_cache_grows(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the room that it began with."""
    monkeypatch.setattr("accessory.hugging_face.accessory_lm._GROWTH", 3)
    ours = AccessoryForCausalLM.from_pretrained(tiny_base, train=False, dtype="fp32")
    how = {"max_new_tokens": 20, "min_new_tokens": 20}
    one, other = (ours.generate(TOKENS[None, :5], use_cache=cached, **how) for cached in (True, False))
    assert one.shape == (1, 25) and torch.equal(one, other)


def test_what_cannot_be(tiny_base: Path) -> None:
    """Each says what was found and what is expected."""
    ours = AccessoryForCausalLM.from_pretrained(tiny_base, train=False, dtype="fp32")
    ids, mask, _ = batch([(row, row) for row in (TOKENS[:9], TOKENS[3:7])], "right")
    with pytest.raises(DataError, match="padded on the left: padding_side='left'"):
        ours.generate(ids, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(ConfigError, match=r"AccessoryForCausalLM cannot be cast to torch\.bfloat16: give dtype="):
        ours.to(torch.bfloat16)
    with pytest.raises(ConfigError, match="return_dict=False: outputs are taken by name"):
        ours(ids, return_dict=False)
    with pytest.raises(DataError, match="input_ids holds 600; expected 0 to 511"):
        ours.generate(torch.tensor([[600]]), max_new_tokens=2)
