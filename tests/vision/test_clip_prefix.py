"""Pictures that are added to prefixes: a whole llama_adapter beside other libraries' parts in float64."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from accessory import MetaModel
from accessory.config import FinetuneConfig
from accessory.data.batch import Document, PackedBatch
from accessory.data.pictures import Picture
from accessory.errors import ConfigError
from accessory.finetuning import finetune
from accessory.generate import KeptCache, next_token_logits, static_memory
from accessory.generate.replays import Recorded
from accessory.meta.sampling import Sampling
from tests.vision.seeing import document, documents, packed, picture
from tests.vision.test_clip import open_clip_checkpoint, open_clip_formula

peft = pytest.importorskip("peft", reason="the extra test is not installed")
transformers = pytest.importorskip("transformers", reason="the extra vision is not installed")
SETTINGS = {"prefix_layers": 1, "prefix_len": 3, "v_embed_dim": 32, "v_depth": 2, "v_num_heads": 2,
            "trainable_mode": "mm_stage1", "bias_tuning": False}  # fmt: skip
Clip = tuple[nn.Module, Path]


@pytest.fixture(scope="module")
def model(tiny_base: Path, clip: Clip) -> MetaModel:
    """In fp32, to be trained; gates, which are the same for all heads, are open."""
    how = {"dtype": "fp32", "train": True, "llama_config": SETTINGS, "vision_path": clip[1]}
    made = MetaModel.from_pretrained(tiny_base, llama_type="llama_adapter", **how)
    nn.init.constant_(made.llma.prefix_gate, 0.8)
    nn.init.constant_(made.llma.visual_proj_norm.weight, 4.0)  # so that pictures differ
    return made


class Reference:
    """In float64: transformers' CLIP, torch's encoder layers, and peft's prefixes on transformers' LLaMA."""

    def __init__(self, model: MetaModel, base: Path, encoder: nn.Module) -> None:
        self.encoder = copy.deepcopy(encoder).double()
        language = transformers.LlamaForCausalLM.from_pretrained(base).double()
        config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")
        self.language = peft.get_peft_model(language, config)
        self.attention = language.model.layers[-1].self_attn
        del self.attention._parameters["adaption_prompt"]
        self.attention.adaption_gate.data = torch.tensor([0.8], dtype=torch.float64).tanh()
        names = ("prefix", *model.vision.projection)
        self.state = {
            name: p.detach().double().requires_grad_()
            for name, p in model.llma.named_parameters()
            if name.split(".")[0] in names
        }

    def added(self, seen: Picture) -> Tensor:
        """What a picture adds to a prefix [3, D]."""
        eyes = self.encoder.vision_model
        found = self.encoder.visual_projection(
            eyes.post_layernorm(eyes(seen.pixels()[None].double()).last_hidden_state)
        )
        x = torch.cat([self.state["visual_query"], self._norm("clip_proj_norm", self._linear("clip_proj", found[0]))])
        layer = nn.TransformerEncoderLayer(32, 2, 128, 0.0, "gelu", batch_first=True, norm_first=True).double()
        theirs = {"attn.qkv": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj.", "mlp.fc1": "linear1.",
                  "mlp.fc2": "linear2.", "norm1": "norm1.", "norm2": "norm2."}  # fmt: skip
        for number in range(2):
            values = {
                f"{their}{leaf}": self.state[f"visual_blocks.{number}.{our}.{leaf}"]
                for our, their in theirs.items()
                for leaf in ("weight", "bias")
            }
            x = torch.func.functional_call(layer, values, (x[None],))[0]
        return self._norm("visual_proj_norm", self._linear("visual_proj", x[:3]))

    def logits(self, document: Document) -> Tensor:
        """[S, V]."""
        prefix = self.state["prefix"][0]
        if document.insets:
            prefix = prefix + self.added(document.insets[0].content)
        self.attention.adaption_prompt = prefix
        return self.language(torch.from_numpy(document.tokens)[None]).logits[0]

    def loss(self, document: Document) -> Tensor:
        """Summed over its labels."""
        return F.cross_entropy(self.logits(document), torch.from_numpy(document.labels), reduction="sum")

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])


def test_logits_and_gradients(model: MetaModel, tiny_base: Path, clip: Clip) -> None:
    """With and without an image: packed, and alone."""
    reference, several = Reference(model, tiny_base, clip[0]), documents(model.vision.place)
    assert [len(each.tokens) for each in several] == [16] * 4 and several[0].insets[0].rows == 0
    model.train().zero_grad()
    ours, wanted = model(packed(*several)), sum(map(reference.loss, several))
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-6)
    for each in several:
        logits = next_token_logits(model.llma, model.hidden(packed(each)))
        torch.testing.assert_close(logits.double(), reference.logits(each), rtol=1e-5, atol=1e-5)
    blind = packed(several[0]._replace(insets=()))
    assert (model.hidden(blind) - model.hidden(packed(several[0]))).abs().max() > 0.1
    model.zero_grad()
    ours = model(packed(*several))
    ours.backward()
    wanted.backward()
    found = dict(model.llma.named_parameters())
    trained = {name.removeprefix("llma.") for name in model.get_trainable_params()}
    assert reference.state.keys() <= trained and not any(name.startswith("clip.") for name in trained)
    for name, value in reference.state.items():
        assert (found[name].grad - value.grad).norm() < 1e-4 * value.grad.norm(), name
        assert value.grad.norm() > 0, name


def test_documents_of_text_share_their_beginning(model: MetaModel) -> None:
    """Beside one with a picture, which shares nothing, though it begins as they do."""
    model.train()
    place, seen = model.vision.place, picture(0)
    several = [document(1, place, each) for each in (seen, None, None)]
    several = [each._replace(labels=np.roll(each.labels, -i), id=i) for i, each in enumerate(several)]
    batch = PackedBatch.pack(several)
    assert sorted(batch.shared)[:2] == [0, 0] and max(batch.shared) >= 8 and len(batch.insets) == 1
    alone = sum(model(packed(each)) for each in several)
    assert model(batch).item() == pytest.approx(alone.item(), rel=1e-6)


def test_a_batch_without_a_picture(model: MetaModel) -> None:
    """All that is trained takes part, as on ranks that have one."""
    model.train().zero_grad()
    model(packed(documents(model.vision.place)[1])).backward()
    behind = {name: p for name, p in model.llma.named_parameters() if name.split(".")[0] in model.vision.projection}
    assert len(behind) == 4 + 1 + 2 * 12 + 4
    assert all(p.grad is not None and not p.grad.any() for p in behind.values())


def test_answers(model: MetaModel) -> None:
    """Those of a batch with and without pictures are each one's alone, and those of whole documents."""
    model.eval()
    prompts, seen = ["What is it?", "What is it?", "And this, what may it be?"], [picture(0), None, picture(1)]
    how = {"temperature": 0.0, "max_gen_len": 8}
    together = model.generate(prompts, seen, **how)
    assert together == [model.generate(*each, **how) for each in zip(prompts, seen, strict=True)]
    assert len(set(together)) == 3
    for prompt, image in zip(prompts, seen, strict=True):
        ids = model.prompt_tokens(prompt)
        for _ in range(4):
            logits = model.compute_logits([ids], [image])[0]
            ids = [*ids, int(logits[-1].argmax())]
        assert [ids[-4:]] == greedy(model, [prompt], [image])


def greedy(model: MetaModel, prompts: list[str], seen: list[Picture | None], count: int = 4) -> list[list[int]]:
    """Ids of the likeliest answers."""
    ids, how = [model.prompt_tokens(prompt) for prompt in prompts], Sampling.of(temperature=0.0, max_gen_len=count)
    steps = list(model.steps(ids, frozenset(), how, pictures=seen))
    return [[step[i] for step in steps] for i in range(len(prompts))]


@pytest.mark.parametrize("static", [False, True])
def test_prompts_that_end_one_by_one(model: MetaModel, monkeypatch: pytest.MonkeyPatch, static: bool) -> None:
    """Of equal prompts about different pictures: those that go on keep what is theirs, also where they move."""
    model.train().eval().requires_grad_(False)  # training forgets where answers were given
    prompts, seen, count = ["What is it?"] * 3, [picture(0), picture(1), None], 8
    alone = [greedy(model, [prompt], [image], count)[0] for prompt, image in zip(prompts, seen, strict=True)]
    stops = {alone[0][2], alone[1][4]}
    wanted = [answer[: next((i for i, token in enumerate(answer) if token in stops), count)] for answer in alone]
    assert sorted(map(len, wanted))[1] < len(wanted[2]) == count and all(wanted)
    monkeypatch.setattr(static_memory, "launches_count", lambda device: static)
    ids, how = [model.prompt_tokens(prompt) for prompt in prompts], Sampling.of(temperature=0.0, max_gen_len=count)
    steps = list(model.steps(ids, frozenset(stops), how, pictures=seen))
    assert [[step[i] for step in steps if step[i] is not None] for i in range(3)] == wanted


def test_answers_in_fixed_places(model: MetaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: recorded once, also where another picture is asked about; and once more where none has been yet."""
    recorded: list[object] = []

    def record(work: Callable[[], Tensor]) -> Recorded:
        """Work is done again at each replay, its result in the same place."""
        recorded.append(work)
        result = torch.empty(0)
        return Recorded(lambda: result.set_(work()), result)

    model.train().eval().requires_grad_(False)  # training forgets where answers were given
    prompts, seen = ["What is it?", "What is it?", "And this?"], [picture(0), None, picture(1)]
    wanted = {
        pictures: greedy(model, prompts, list(pictures)) for pictures in (tuple(seen), tuple(seen[::-1]), (None,) * 3)
    }
    monkeypatch.setattr(static_memory, "launches_count", lambda device: True)
    monkeypatch.setattr(static_memory, "recorder_for", lambda device, ranks: record)
    for pictures, recordings in (((None,) * 3, 1), (tuple(seen), 2), (tuple(seen[::-1]), 2), ((None,) * 3, 2)):
        assert greedy(model, prompts, list(pictures)) == wanted[pictures]
        assert len(recorded) == recordings
    assert len({str(answers) for answers in wanted.values()}) == 3


def test_a_conversation_about_another_picture(model: MetaModel) -> None:
    """A kept cache goes on with the same picture, and begins anew with another, or with none."""
    model.eval()
    ids, how, kept = model.prompt_tokens("What is it?"), Sampling.of(temperature=0.0, max_gen_len=4), KeptCache()
    known = []
    inner = KeptCache.begin
    for image in (None, picture(0), picture(0), picture(1), None):
        given = {"kept": kept, "pictures": [image]}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(KeptCache, "begin", lambda *args: known.append(inner(*args)) or known[-1])
            found = [token for (token,) in model.steps([ids], frozenset(), how, **given)]
        assert [found] == greedy(model, ["What is it?"], [image])
    assert known == [0, 0, len(ids) - 1, 0, 0]


def trained(base: Path, *parts: Path, out: Path, encoder: Path, **settings) -> Path:
    """The checkpoint of a run beside an NF4 base, on three questions about pictures and three others."""
    out.mkdir()
    records = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("one", "two", "three")]
    for number in range(3):
        (out / f"{number}.png").write_bytes(picture(number).file)
    seen = [record | {"image": f"{number}.png"} for number, record in enumerate(records)]
    (out / "data.json").write_text(json.dumps(records + seen))
    (out / "adapter.json").write_text(json.dumps(SETTINGS | settings))
    config = FinetuneConfig(
        pretrained_path=[base, *parts], vision_path=encoder, llama_type="llama_adapter", device="cpu", epochs=3,
        llama_config=[out / "adapter.json"], data_config=[out / "data.json"], batch_size=6, accum_iter=1, max_words=128,
        lr=1e-2, warmup_epochs=0, quant=True, only_save_trainable=True, output_dir=out,
        image_transform="padded_resize",
    )  # fmt: skip
    finetune(config)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and lines[-1]["loss"] < lines[0]["loss"]
    return out / "epoch2"


def test_two_stages_and_upstreams_files(tiny_base: Path, clip: Clip, tmp_path: Path) -> None:
    """The first trains what sees, the second leaves it. What LLaMA2-Accessory would save, open_clip's names, loads."""
    first = trained(tiny_base, out=tmp_path / "first", encoder=clip[1])
    saved = load_file(first / "trainable.safetensors")
    assert {
        "visual_query",
        "visual_blocks.1.attn.qkv.weight",
        "visual_proj_norm.bias",
        "clip_proj.weight",
    } < saved.keys()
    second = trained(
        tiny_base, first, out=tmp_path / "second", encoder=clip[1], trainable_mode="mm_stage2", lora_rank=2
    )
    kept = load_file(second / "trainable.safetensors")
    assert not any(name.startswith(("visual", "clip", "prefix")) for name in kept) and len(kept) > 20
    model = MetaModel.from_pretrained(second, device="cpu", dtype="fp32")
    assert type(model.vision).__name__ == "ClipPrefix" and torch.equal(model.llma.visual_query, saved["visual_query"])
    blind = MetaModel.from_pretrained(second, device="cpu", dtype="fp32", with_visual=False)
    one, other, third = (its.compute_logits("Say two.", image) for its, image in
                         ((model, None), (model, picture(0)), (blind, None)))  # fmt: skip
    assert torch.equal(one, third) and (one - other).abs().max() > 1e-3
    (theirs := tmp_path / "theirs").mkdir()
    held = open_clip_checkpoint()
    torch.save(
        {"model": {f"llma.{name}": value for name, value in (saved | held).items()}},
        theirs / "consolidated.00-of-01.model.pth",
    )
    how = {"llama_type": "llama_adapter", "llama_config": [SETTINGS], "device": "cpu", "dtype": "fp32"}
    loaded = MetaModel.from_pretrained([tiny_base, theirs], **how)
    assert torch.equal(loaded.llma.visual_blocks[1].mlp.fc2.weight, saved["visual_blocks.1.mlp.fc2.weight"])
    pixels = picture(0).pixels()[None]
    found = loaded.vision.features(loaded.llma, pixels)
    torch.testing.assert_close(found.double(), open_clip_formula(held, pixels).detach(), rtol=0, atol=1e-5)


def test_what_cannot_see(tiny_base: Path, blip2: tuple) -> None:
    """A Q-Former's rows have no place in a prefix."""
    with pytest.raises(ConfigError, match="which is qformerv2: models of this type see by CLIP; give its directory"):
        MetaModel.from_pretrained(tiny_base, llama_type="llama_adapter", vision_path=blip2[1], device="cpu")
    with pytest.raises(ConfigError, match="Images go with llama_qformerv2, llama_qformerv2_peft"):
        MetaModel.from_pretrained(tiny_base, llama_type="llama_qformerv2_adapter", device="cpu")
