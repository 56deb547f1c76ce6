"""Side tuning of models that transformers loaded: their bytes, their logits, and the losses of our engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from accessory.config import FinetuneConfig
from accessory.data.corpus import build_corpus
from accessory.data.order import GlobalOrder
from accessory.errors import CheckpointError, ConfigError, DataError
from accessory.finetuning import finetune
from accessory.hugging_face import QSTConfig, QSTForCausalLM, QSTLlamaForCausalLM, QSTOPTForCausalLM
from accessory.meta import MetaModel
from accessory.quant import PackedWeight
from accessory.tokenizer import open_tokenizer
from tests.conftest import DATA, VOCABULARY, write_tokenizer

SIDE = {"label_share": 1, "r": 4, "peft_hidden_size": 8}
CLASSES = {"llama": QSTLlamaForCausalLM, "opt": QSTOPTForCausalLM}
STEPS, ACCUMULATED, LR, CLIP = 3, 2, 3e-3, 1.0
LONGEST = 128  # tokens of a document
TOKENS = torch.arange(40) * 7 % 500


@pytest.fixture(scope="session")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of transformers by family, in fp32."""
    opt = tmp_path_factory.mktemp("tiny_opt")
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, ffn_dim=256, num_attention_heads=4,
        max_position_embeddings=512, word_embed_proj_dim=128, init_std=0.1, bos_token_id=0, eos_token_id=1,
        pad_token_id=1, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.OPTForCausalLM(config).save_pretrained(opt)
    write_tokenizer(opt)
    return {"llama": tiny_base, "opt": opt}


def loaded(path: Path, bits: bool = True, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """As users load a base: NF4 with double quantization on the CPU, or plain."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    how = {"quantization_config": settings} if bits else {}
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map={"": "cpu"}, **how)


@pytest.fixture(scope="session")
def made(bases: dict[str, Path]) -> Callable[..., tuple[QSTForCausalLM, transformers.PreTrainedModel]]:
    """(family, settings) -> a side-tuned model that nobody has trained yet, and the model that it was made of."""

    def make(family: str = "llama", bits: bool = True, **settings) -> tuple:
        theirs = loaded(bases[family], bits)
        return CLASSES[family](theirs, theirs.config, QSTConfig(**{**SIDE, **settings})), theirs

    return make


def moved(model: QSTForCausalLM) -> QSTForCausalLM:
    """With a side network at random, so that it adds something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


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


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(made, side: str) -> None:
    """Rows of different lengths give the logits and loss that each gives alone; padding gives zeros."""
    model = moved(made()[0])
    rows = [TOKENS[:12], TOKENS[5:8], TOKENS[20:21]]
    ids, mask, labels = batch([(row, row) for row in rows], side)
    out = model(ids, mask, labels)
    alone = [model(row[None], labels=row[None]) for row in rows[:2]]
    for row, expected in enumerate(alone):
        torch.testing.assert_close(out.logits[row][mask[row] == 1], expected.logits[0], rtol=1e-5, atol=1e-5)
    assert not out.logits[mask == 0].any()
    assert out.loss.item() == pytest.approx(sum(alone[i].loss.item() * n for i, n in ((0, 11), (1, 2))) / 13, rel=1e-5)
    assert out[0] is out.loss is out["loss"] and out[1:] == (out.logits,)
    assert model(ids, mask)[0].shape == (3, 12, VOCABULARY)


def batch(rows: list[tuple[Tensor, Tensor]], side: str = "right") -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels [B, S] of (tokens, labels), which are those of the tokens themselves."""
    longest = max(len(tokens) for tokens, _ in rows)

    def padded(values: Tensor, with_: int) -> Tensor:
        rest = values.new_full((longest - len(values),), with_)
        return torch.cat([rest, values] if side == "left" else [values, rest])

    return (
        torch.stack([padded(tokens, 1) for tokens, _ in rows]),
        torch.stack([padded(torch.ones_like(tokens), 0) for tokens, _ in rows]),
        torch.stack([padded(labels, -100) for _, labels in rows]),
    )


def test_logits_have_a_gradient(made) -> None:
    """For a loss of one's own: that of transformers from the logits is ours, and so are its gradients."""
    model, found = moved(made()[0]), []
    for own in (True, False):
        out = model(TOKENS[None], labels=TOKENS[None])
        loss = torch.nn.functional.cross_entropy(out.logits[0, :-1], TOKENS[1:]) if own else out.loss
        model.zero_grad()
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# Training


@pytest.fixture(scope="session")
def engines_losses(bases, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[float]]:
    """Losses of a run of our engine, by family and `tail`."""
    found: dict[tuple[str, int], list[float]] = {}

    def run(family: str, tail: int = 0) -> list[float]:
        if (family, tail) not in found:
            folder = tmp_path_factory.mktemp("run")
            (folder / "qst.json").write_text(json.dumps(SIDE | {"tail": tail}))
            (folder / "data.yaml").write_text(f"META:\n  - path: {DATA}\n    type: text\n")
            config = FinetuneConfig(
                pretrained_path=[bases[family]], data_config=folder / "data.yaml", output_dir=folder / "out",
                llama_type=f"{family}_qst", llama_config=[folder / "qst.json"], quant=True, precision="fp32",
                only_save_trainable=True, device="cpu", batch_size=2, accum_iter=ACCUMULATED, max_steps=STEPS, lr=LR,
                min_lr=LR, warmup_epochs=0, clip_grad=CLIP, weight_decay=0.0, max_words=LONGEST, seed=0,
            )  # fmt: skip
            finetune(config)
            lines = (folder / "out" / "log.jsonl").read_text().splitlines()
            found[family, tail] = [json.loads(line)["loss"] for line in lines]
        return found[family, tail]

    return run


def documents(path: Path) -> Iterator[list[dict[str, Tensor]]]:
    """Of each step of that run its documents, with labels as transformers has them: the first never counts."""
    corpus = build_corpus(DATA, open_tokenizer(path), max_words=LONGEST)
    order = GlobalOrder(corpus, batch_size=2, accum_iter=ACCUMULATED, seed=0)
    for step in range(STEPS):
        rows = []
        for number in order.global_ids(0, step):
            tokens, following = (torch.from_numpy(part.astype("int64")) for part in corpus.document(number))
            rows.append({"input_ids": tokens, "labels": torch.cat([tokens[:1], following[:-1]])})
            assert following[-1] == -100
        yield rows


def collated(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A padded batch."""
    parts = batch([(row["input_ids"], row["labels"]) for row in rows])
    return dict(zip(("input_ids", "attention_mask", "labels"), parts, strict=True))


def optimizer_of(model: QSTForCausalLM) -> torch.optim.Optimizer:
    """The engine's."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, betas=(0.9, 0.95), weight_decay=0.0
    )


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


class Recording(transformers.Trainer):
    """Keeps each step's loss, unrounded, and takes documents in their order."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def training_step(self, *args, **kwargs) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss

    def _get_train_sampler(self, *args) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(model: QSTForCausalLM, path: Path, folder: Path, accumulated: int = ACCUMULATED, **how) -> Recording:
    """Trains on the documents of the engine's run."""
    rows = [row for step in documents(path) for row in step]
    arguments = transformers.TrainingArguments(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=accumulated, max_steps=STEPS, use_cpu=True,
        max_grad_norm=CLIP, save_steps=2, report_to=[], logging_steps=1, lr_scheduler_type="constant",
        disable_tqdm=True, dataloader_pin_memory=False, **how,
    )  # fmt: skip
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return Recording(
        model, arguments, data_collator=collated, train_dataset=rows, eval_dataset=rows[:3],
        optimizers=(optimizer, schedule), compute_metrics=lambda p: {"shape": list(p.predictions.shape)},
    )  # fmt: skip


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
    worker, ranks = Path(__file__).parent / "hugging_face_worker.py", 2
    done = torchrun(ranks, worker, bases["llama"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    each = [json.loads((tmp_path / f"losses{rank}.json").read_text()) for rank in range(ranks)]
    # Each rank's loss is multiplied by their number, because gradients are averaged.
    means = [sum(losses) / ranks for losses in zip(*each, strict=True)]
    assert means == pytest.approx(engines_losses("llama"), rel=1e-5)


# Answers and files


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


@pytest.mark.slow
@pytest.mark.parametrize("family", CLASSES)
def test_saved_it_gives_the_same_logits(made, bases, family: str, tmp_path: Path) -> None:
    """In Python and, behind its base, in every command of ours."""
    model = moved(made(family, start="released")[0])
    wanted = model(TOKENS[None]).logits[0]
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):  # the second replaces the first
        model.save_qst_state(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    again, _ = made(family, start="released")
    again.load_qst_state(str(tmp_path))
    assert torch.equal(again(TOKENS[None]).logits[0], wanted)
    asked = MetaModel.from_pretrained([bases[family], tmp_path], dtype="fp32", quant=True)
    assert torch.equal(asked.logits(TOKENS, (40,)), wanted)
    with pytest.raises(ConfigError, match="was trained with start 'released', here it is 'base'"):
        made(family)[0].load_qst_state(tmp_path)
    (tmp_path / "config.json").unlink()
    for settings, fault in (
        ({"r": 8}, r"side\.0\.attention\.wq\.weight has shape \(32, 32\), expected \(16, 16\).* and \d+ more"),
        ({"embedding_downsample": "own"}, r"embedding_downsample\.a\.weight is missing"),
        ({"side_layers": 2}, r"gates\.1\.weight has no place"),
    ):
        with pytest.raises(CheckpointError, match=rf"does not fit this side network: .*{fault}"):
            made(family, start="released", **settings)[0].load_qst_state(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: belongs to a transformers model"):
        model.save_qst_state(bases[family])


@pytest.mark.parametrize("family", CLASSES)
def test_published_files(made, family: str, tmp_path: Path) -> None:
    """Written and read; its frozen norms and OPT's other gate among them."""
    model = moved(made(family, start="released")[0])
    model.save_qst_state(tmp_path / "side", released=True)
    gate = {"llama": "lm_head_z_path.pt", "opt": "lm_head_z_parameters.pt"}[family]
    parts = ("layers", "z", "downsample", "norm", "upsample")
    assert {file.name for file in (tmp_path / "side").iterdir()} == {gate, *(f"qst_{p}_parameters.pt" for p in parts)}
    again, _ = made(family, start="released")
    again.load_qst_state(tmp_path / "side")
    assert torch.equal(again(TOKENS[None]).logits, model(TOKENS[None]).logits)
    with pytest.raises(CheckpointError, match=r"cannot express start 'base' \(only 'released'\)"):
        made(family)[0].save_qst_state(tmp_path / "other", released=True)


# Refusals


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


def test_settings_are_the_published_ones() -> None:
    """And ours; what is wrong is named."""
    theirs = QSTConfig(
        add_layer_norm_before_adapter=False, add_layer_norm_after_adapter=True, r=16, alpha_r=16, dropout=0.1,
        activation="swish", fan_in_fan_out=False, peft_hidden_size=16,
    )  # fmt: skip
    assert (theirs.r, theirs.dropout, theirs.adapter_activation) == (16, 0.1, "silu")
    assert QSTConfig(activation="gelu_new", start="released").adapter_activation == "gelu_tanh"
    with pytest.raises(
        ConfigError, match=r"QSTConfig: unknown key 'peft_hiden_size'\. Did you mean 'peft_hidden_size'"
    ):
        QSTConfig(peft_hiden_size=8)
    with pytest.raises(ConfigError, match="QSTConfig: 'r' is 0"):
        QSTConfig(r=0)


def test_batches_and_casts_that_cannot_be(made) -> None:
    """Each says what was found."""
    model, ids = made()[0], TOKENS[None, :4]
    with pytest.raises(DataError, match="row 0 has padding between its tokens"):
        model(ids, torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(DataError, match=r"attention_mask has shape \(1, 3\); expected \(1, 4\)"):
        model(ids, torch.ones(1, 3))
    with pytest.raises(DataError, match="all of it is padding"):
        model(ids, torch.zeros(1, 4))
    with pytest.raises(DataError, match=f"input_ids holds 512; expected 0 to {VOCABULARY - 1}"):
        model(torch.tensor([[3, 512]]))
    with pytest.raises(DataError, match="labels holds 600"):
        model(ids, labels=torch.full((1, 4), 600))
    with pytest.raises(ConfigError, match=r"cannot be cast to torch\.bfloat16"):
        model.to(torch.bfloat16)
    assert model.to("cpu") is model
