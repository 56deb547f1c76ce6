"""Runs that see images, from LLaMA2-Accessory's files: its script trains on two processes, resumes, and answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from accessory import MetaModel
from accessory.checkpoint.describe import describe
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.vision_part import VISION_FORMAT
from accessory.config import FinetuneConfig
from accessory.errors import AccessoryError, CheckpointError, ConfigError
from accessory.export import Destination, export_adapter, merge
from accessory.finetuning import finetune
from demos.terminal import printable
from tests.conftest import ROOT, run_python
from tests.vision.seeing import document, packed, picture, write_stage_one

pytest.importorskip("transformers", reason="the extra vision is not installed")
library = pytest.importorskip("PIL.Image", reason="the extra vision is not installed")
SCRIPT = ROOT / "exps" / "finetune" / "mm" / "alpacaLlava_llamaQformerv2Peft_QF_13B.sh"
SHORT = ("--batch_size", "2", "--num_workers", "2", "--epochs", "2", "--lr", "1e-3", "--warmup_epochs", "0")


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, blip2: tuple) -> Path:
    """Upstream's files of a whole llama_qformerv2."""
    directory = tmp_path_factory.mktemp("upstream") / "stage_one"
    directory.mkdir()
    write_stage_one(directory, tiny_base, blip2[1])
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions of text and six about pictures, listed as alpaca_llava.yaml lists its own."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train2017").mkdir()
    pairs = [(f"Say {word}.", word) for word in ("one", "two", "three", "four", "five", "six")]
    numbers = np.random.default_rng(0)
    for number in range(6):
        pixels = numbers.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        library.fromarray(pixels).save(folder / "train2017" / f"{number}.jpg")
    texts = [{"instruction": asked, "input": "", "output": told} for asked, told in pairs]
    seen = [{"image": f"{number}.jpg", "conversations": [{"from": "human", "value": f"<image>\n{asked}"},
            {"from": "gpt", "value": told}]} for number, (asked, told) in enumerate(pairs)]  # fmt: skip
    (folder / "texts.json").write_text(json.dumps(texts))
    (folder / "seen.json").write_text(json.dumps(seen))
    listed = yaml.safe_load((ROOT / "configs/data/finetune/mm/alpaca_llava.yaml").read_text())["META"]
    listed[0]["path"], listed[1]["path"], listed[1]["root"] = "texts.json", "seen.json", "train2017"
    (folder / "data.yaml").write_text(yaml.safe_dump({"META": listed}))
    return folder / "data.yaml"


def run_script(stage_one: Path, data: Path, output: Path, environment: dict[str, str], *more: str | Path) -> str:
    """The script on two processes, as its first lines say; what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    variables = {"PATH": path, "NPROC": "2", "DEVICE": "cpu", "OUTPUT": str(output)}
    given = (stage_one, stage_one.parent / "params.json", stage_one.parent, "--data_config", data, *SHORT, *more)
    command = ["bash", str(SCRIPT), *map(str, given)]
    done = subprocess.run(command, cwd=output.parent, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def losses(output: Path) -> list[float]:
    """Of each step."""
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


def test_the_quantized_script(stage_one: Path, data: Path, tmp_path: Path, clean_environment) -> None:
    """Two epochs at once, and the second one after a pause: the same bits. What is saved answers by itself.

    One process with all documents of a step has the losses of two, of which one may have no image.
    """
    said = run_script(stage_one, data, tmp_path / "whole", clean_environment)
    assert "llama_qformerv2_peft on 2 x cpu" in said and "  encoder " in said and "6 documents have an image" in said, (
        said
    )
    whole = next((tmp_path / "whole").rglob("epoch1"))
    run_script(stage_one, data, tmp_path / "again", clean_environment, "--resume", whole.with_name("epoch0"))
    again = next((tmp_path / "again").rglob("epoch1"))
    one, other = (load_file(folder / "trainable.safetensors") for folder in (whole, again))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    behind = {name for name in one if not name.startswith(("layers.", "norm."))}
    assert behind == {"qformer_proj.0.bias", "qformer_proj.1.weight", "qformer_proj.1.bias"}
    first = load_file(whole.with_name("epoch0") / "trainable.safetensors")
    assert not any(first[name].equal(one[name]) for name in behind)
    alone = json.loads((whole / "run.json").read_text())["arguments"] | {"batch_size": 4}
    finetune(FinetuneConfig(**alone | {"output_dir": tmp_path / "alone", "max_steps": 3, "model_parallel_size": 1}))
    assert losses(tmp_path / "alone") == pytest.approx(losses(whole.parent)[:3], rel=2e-3)
    model = MetaModel.from_pretrained(whole, device="cpu")
    assert model.llma.qformer.vision_model.encoder.layers[0].mlp.fc2.weight.bits == 4
    check_their_part(stage_one, one, tmp_path / "theirs")
    image = data.parent / "train2017" / "1.jpg"
    how = {"image_transform": "resized_center_crop", "max_gen_len": 8}
    answers = [model.generate(model.question("Say two."), images=seen, **how) for seen in (image, None)]
    assert answers[0] != answers[1]
    asked = ("--image", image, "--prompt", "Say two.", "--temperature", "0", "--max_gen_len", "8")
    shown = run_python(ROOT / "demos/single_turn_mm.py", "--pretrained_path", whole, "--device", "cpu", *asked)
    assert f"A: {printable(answers[0])}" in shown.stdout, shown.stdout + shown.stderr


def check_their_part(stage_one: Path, trained: dict[str, torch.Tensor], folder: Path) -> None:
    """What they save of the same part, which lacks the norm's weight, is laid over their stage 1."""
    folder.mkdir()
    theirs = {f"llma.{name}": value for name, value in trained.items() if name != "qformer_proj.1.weight"}
    torch.save({"model": theirs}, folder / "consolidated.00-of-01.model.pth")
    settings = [stage_one.parent / "params.json", ROOT / "configs/model/finetune/sg/llamaPeft_normBiasLora.json"]
    model = MetaModel.from_pretrained(
        [stage_one, folder], llama_type="llama_qformerv2_peft", llama_config=settings, device="cpu", dtype="fp32",
        tokenizer_path=stage_one.parent,
    )  # fmt: skip
    found = dict(model.llma.named_parameters())
    assert all(found[name.removeprefix("llma.")].equal(value) for name, value in theirs.items())
    first = torch.load(stage_one / "consolidated.00-of-02.model.pth", weights_only=True)["model"]
    assert found["qformer_proj.1.weight"].equal(first["llma.qformer_proj.1.weight"])


@pytest.fixture
def given(tiny_base: Path, clip: tuple, data: Path, tmp_path: Path) -> dict:
    """Flags of a run that begins with a plain base and CLIP."""
    (tmp_path / "vision.json").write_text('{"vision_tuning": true, "lora_rank": 2}')
    return {
        "pretrained_path": [tiny_base], "vision_path": clip[1], "llama_type": "llama_peft", "device": "cpu",
        "llama_config": [tmp_path / "vision.json"], "data_config": [data], "batch_size": 4, "accum_iter": 1,
        "epochs": 2, "max_words": 512, "lr": 1e-3, "quant": True, "only_save_trainable": True,
        "output_dir": tmp_path / "out", "image_transform": "padded_resize",
    }  # fmt: skip


def test_a_plain_base_and_clip(given: dict, clip: tuple, tmp_path: Path, capsys) -> None:
    """Its projection starts anew, is learned and saved. The cache changes no bit, and is read in the second epoch."""
    finetune(FinetuneConfig(**given))
    finetune(FinetuneConfig(**given | {"cache_features": tmp_path / "cache", "output_dir": tmp_path / "cached"}))
    one, other = (load_file(tmp_path / name / "epoch1" / "trainable.safetensors") for name in ("out", "cached"))
    assert {"clip_proj.weight", "clip_proj.bias", "clip_proj_norm.weight", "clip_proj_norm.bias"} < one.keys()
    assert all(one[name].equal(other[name]) for name in one) and not any(name.startswith("clip.") for name in one)
    assert "--cache_features: 6 images of this rank were there, 6 were computed" in capsys.readouterr().out
    saved = tmp_path / "out" / "epoch1"
    assert [entry["format"] for entry in json.loads((saved / "run.json").read_text())["base"]][1] == VISION_FORMAT
    assert "clip: squares of 28 pixels become 5 rows" in describe(open_source(saved))
    assert "clip: squares of 28 pixels become 5 rows" in describe(open_source(clip[1]))
    model = MetaModel.from_pretrained(saved, device="cpu")
    named = MetaModel.from_pretrained([given["pretrained_path"][0], saved], device="cpu")
    text = MetaModel.from_pretrained(saved, device="cpu", with_visual=False)
    assert (model.vision.name, named.vision.name, text.vision) == ("clip", "clip", None)
    assert not any(name.startswith("clip") for name, _ in text.llma.named_parameters())
    held = named.llma.clip.visual_projection.weight
    named.use(tmp_path / "cached" / "epoch1")
    assert named.encoder.decoder is named.llma and named.llma.clip.visual_projection.weight is held
    image, prompt = given["data_config"][0].parent / "train2017" / "1.jpg", model.question("Say two.")
    asked = model.generate(prompt, images=image, max_gen_len=8)
    for part, sees in ((None, None), (saved, "clip")):  # the base alone has no projection, so that it sees nothing
        model.use(part)
        assert (model.vision and model.vision.name) == sees
    assert model.generate(prompt, images=image, max_gen_len=8) == asked
    (moved := tmp_path / "moved").symlink_to(clip[1])
    model = MetaModel.from_pretrained(saved, vision_path=moved, device="cpu")
    assert [source.path for source in model._loaded.sources][1] == moved
    clip[1].rename(tmp_path / "elsewhere")
    try:
        with pytest.raises(CheckpointError, match=r"which is not there. Bring it back, .*: --vision_path DIR"):
            MetaModel.from_pretrained(saved, device="cpu")
        assert MetaModel.from_pretrained(saved, vision_path=tmp_path / "elsewhere", device="cpu").vision
        assert MetaModel.from_pretrained(saved, with_visual=False, device="cpu").vision is None
    finally:
        (tmp_path / "elsewhere").rename(clip[1])
    with pytest.raises(CheckpointError, match="holds an image encoder alone; give it with --vision_path"):
        MetaModel.from_pretrained(clip[1], device="cpu")
    with pytest.raises(CheckpointError, match=r"--vision_path \S+: its model_type is .llama.; expected .* BLIP-2 or"):
        MetaModel.from_pretrained(saved, vision_path=given["pretrained_path"][0], device="cpu")


def test_all_is_trained(given: dict, blip2: tuple, tmp_path: Path) -> None:
    """But for the encoder, which a whole checkpoint holds as it was, and one of what is trained names."""
    full = {"llama_type": "llama_qformerv2", "vision_path": blip2[1], "llama_config": [], "quant": False, "epochs": 1}
    finetune(FinetuneConfig(**given | full | {"only_save_trainable": False}))
    whole = load_file(tmp_path / "out" / "epoch0" / "model.safetensors")
    first = {f"qformer.{name}": value for name, value in blip2[0].state_dict().items()}
    encoder = {name for name in whole if name.startswith("qformer.")}
    assert len(encoder) > 50 and all(whole[name].equal(first[name].bfloat16()) for name in encoder)
    finetune(FinetuneConfig(**given | full | {"output_dir": tmp_path / "part"}))
    part = load_file(tmp_path / "part" / "epoch0" / "trainable.safetensors")
    assert part.keys() == whole.keys() - encoder and part["start_img"].dtype == torch.float32
    models = [MetaModel.from_pretrained(tmp_path / name / "epoch0", device="cpu") for name in ("out", "part")]
    batch = packed(document(0, models[0].vision.place, picture(1)))
    assert models[0](batch).item() == models[1](batch).item()
    assert [len(model._loaded.sources) for model in models] == [1, 3]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"llama_config": []}, r"clip_proj.weight is missing. They turn .* \"vision_tuning\": true"),
        (
            {"llama_type": "llama_qst"},
            r"--llama_type llama_qst with an image encoder: .* leave it out with --no_visual",
        ),
        ({"llama_type": "llama_qsft"}, r"--llama_type llama_qsft with an image encoder: .* with --no_visual"),
        ({"llama_type": "opt_peft"}, "models of llama alone see images; leave it out with --no_visual"),
        ({"llama_type": "llama_qformerv2_peft"}, r"which is clip: give --llama_type llama_peft, or .* --no_visual"),
        ({"teacher": ["base"], "quant": False}, "--teacher with an image encoder: a teacher is given tokens alone"),
        ({"no_visual": True}, r"--vision_path \S+ contradicts --no_visual: leave one out"),
        ({"image_transform": "random_resized_crop", "cache_features": "x"}, "resized_center_crop or padded_resize"),
        ({"vision_path": None, "cache_features": "x"}, "the model has no image encoder; leave it out"),
        (
            {"cache_features": Path(__file__) / "x"},
            r"--cache_features \S+: \S+test_runs.py is a file; expected a direct",
        ),
        ({"vision_path": "nowhere"}, "--vision_path nowhere: no such file or directory"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be(given: dict, changed: dict, said: str) -> None:
    """Refused with the flag to change, before any weight is read."""
    with pytest.raises(AccessoryError, match=said):
        finetune(FinetuneConfig(**given | changed))


def test_without_what_sees(given: dict, stage_one: Path, tmp_path: Path, capsys) -> None:
    """--no_visual reads upstream's file as a text model, whose records with images are left out, and counted.

    Without it that file has an encoder, which another kind's does not replace.
    """
    place = {"pretrained_path": [stage_one], "tokenizer_path": stage_one.parent, "vision_path": None}
    params = {"llama_config": [stage_one.parent / "params.json"], "max_skipped": 0.6, "max_steps": 1}
    with pytest.raises(
        CheckpointError, match=r"has the image encoder qformerv2, \S+ has clip: they do not go together"
    ):
        finetune(FinetuneConfig(**given | place | {"vision_path": given["vision_path"]}))
    model = finetune(FinetuneConfig(**given | place | params | {"no_visual": True}))
    assert model.vision is None and not any("qformer" in name for name, _ in model.named_parameters())
    assert "skipped 6: has 'image', which the model does not take" in capsys.readouterr().out


def test_written_as_one_model(given: dict, tmp_path: Path, data: Path) -> None:
    """Merged as ours it keeps its eyes, and answers as the parts do; other formats have no place for them."""
    finetune(FinetuneConfig(**given))
    saved, whole = tmp_path / "out" / "epoch1", tmp_path / "whole"
    merge([saved], whole, Destination("accessory", "fp32"), base=None, drop_biases=False)
    one, other = (MetaModel.from_pretrained(path, dtype="fp32", device="cpu", quant=quant)
                  for path, quant in ((saved, None), (whole, False)))  # fmt: skip
    batch = packed(document(0, one.vision.place, picture(1)))
    assert one(batch).item() == pytest.approx(other(batch).item(), rel=1e-3)
    assert json.loads((whole / "meta.json").read_text())["llama_type"] == "llama"
    with pytest.raises(ConfigError, match=r"--to hf has no place for the image encoder .clip.: .* --no_visual"):
        merge([saved], tmp_path / "hf", Destination("hf"), base=None, drop_biases=False)
    with pytest.raises(ConfigError, match="--to peft has no place for what was trained behind the image encoder"):
        export_adapter([saved], tmp_path / "peft", drop_biases=True)
    merge([saved], tmp_path / "hf", Destination("hf"), base=None, drop_biases=True, no_visual=True)
    assert MetaModel.from_pretrained(tmp_path / "hf", device="cpu").vision is None
