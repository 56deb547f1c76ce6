"""Run in a copy of the code with a section of docs/extending.md added: what was added is used, and measured."""

from __future__ import annotations

import json
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pytest import raises
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.config import FinetuneConfig
from accessory.errors import ConfigError
from accessory.export import Destination, convert
from accessory.finetuning import finetune
from accessory.generate import generate_tokens
from accessory.meta import MetaModel
from accessory.model.loss import cross_entropy_sum
from accessory.parallel import groups
from tests.conftest import DATA, TINY_CONFIG, write_model, write_tokenizer
from tests.memory.small_models import Kept, filled, planned
from tests.memory.test_plan import MIDDLE, planned_and_measured
from tests.method import test_base

IDS = torch.arange(40) * 7 % 500
TOLERANCE = 0.05  # of the memory plan


def trained(base: Path, output: Path, llama_type: str, records: list[dict] | None = None, **more: Any) -> Path:
    """What some steps on one batch leave, whose loss fell; loaded, it answers bit for bit as what was trained."""
    test_base.test_help_names_every_method_and_family()
    data = output.with_suffix(".json")
    data.write_text(json.dumps(records or json.loads(DATA.read_text())[:4]))
    model = finetune(FinetuneConfig(
        pretrained_path=[base], data_config=data, output_dir=output, llama_type=llama_type, device="cpu", epochs=8,
        save_interval=8, max_words=128, batch_size=4, accum_iter=1, num_workers=0, lr=1e-2, warmup_epochs=0.0,
        precision="fp32", only_save_trainable=True, **more,
    ))  # fmt: skip
    losses = [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.97 * losses[0], losses
    (part,) = output.glob("epoch*")
    assert torch.equal(logits(part), model.eval().logits(IDS, (40,)))
    return part


def logits(path: Path) -> Tensor:
    """Of one document, fp32 [S, V]."""
    return MetaModel.from_pretrained(path, dtype="fp32").logits(IDS, (40,))


def check_kept(**what: Any) -> None:
    """What a forward keeps is near the plan's count."""
    decoder, attachment = filled(layout := groups.start("cpu"), {}, **what)
    with Kept(decoder) as kept:
        hidden = decoder(IDS % 96, decoder.sequences((40,)))
        loss = cross_entropy_sum(hidden, decoder.head_weight, IDS % 96, 96)
    loss.backward()
    found = planned(decoder, attachment, layout, tokens=40).activations
    assert abs(found - kept.bytes) <= TOLERANCE * kept.bytes, (found, kept.bytes)
    print(f"plan: {found / kept.bytes - 1:+.2%} of what is kept")


def check_total(**what: Any) -> None:
    """What a step allocates at its worst is near the plan's total."""
    total, measured = planned_and_measured(groups.start("cpu"), MIDDLE, settings={}, **what)
    assert abs(total - measured) <= TOLERANCE * measured, (total, measured)
    print(f"plan: {total / measured - 1:+.2%} of what is allocated")


def family(base: Path, work: Path) -> None:
    """Acorn's files give the logits of the same weights under Mistral's names, and are written back as they were."""
    settings = {"model_type": "mistral", "sliding_window": 6}
    (work / "mistral").mkdir()
    write_model(work / "mistral", TINY_CONFIG | settings)
    write_tokenizer(work / "mistral")
    (work / "acorn").mkdir()
    write_tokenizer(work / "acorn")
    config = {
        "model_type": "acorn", "architectures": ["AcornForCausalLM"], "width": 128, "depth": 2, "heads": 4,
        "kv_heads": 2, "words": 512, "mlp_width": 256, "reach": 512, "epsilon": 1e-5, "rope_theta": 10000.0,
        "sliding_window": 6,
    }  # fmt: skip
    (work / "acorn" / "config.json").write_text(json.dumps(config))
    weights = acorn(load_file(work / "mistral" / "model.safetensors"))
    save_file(weights, work / "acorn" / "model.safetensors")
    assert torch.equal(logits(work / "acorn"), logits(work / "mistral"))
    convert([work / "acorn"], work / "again", Destination("hf", "fp32"))
    again = load_file(work / "again" / "model.safetensors")
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
    assert config.items() <= json.loads((work / "again" / "config.json").read_text()).items()
    trained(work / "acorn", work / "out", "acorn_peft")


def acorn(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """LLaMA's tensors under Acorn's names; of q, k and v, rows stand together that belong to one key/value head."""
    names = {
        "model.embed_tokens": "soil", "model.norm": "crown", "lm_head": "leaves", "model.layers": "rings",
        "self_attn.o_proj": "mix.out", "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down", "input_layernorm": "mix.norm", "post_attention_layernorm": "mlp.norm",
        "self_attn.q_proj": "mix.qkv",
    }  # fmt: skip
    made = {}
    for name, tensor in theirs.items():
        if "q_proj" in name:
            heads = (theirs[name.replace("q_proj", f"{x}_proj")].view(2, -1, 128) for x in "qkv")
            tensor = torch.cat(list(heads), 1).view(-1, 128)
        for old, new in names.items():
            name = name.replace(old, new)
        if "_proj" not in name:
            made[name] = tensor.contiguous()
    return made


def side(base: Path, work: Path) -> None:
    """Trained beside 4 bits with blocks run again; one answer is by way of both caches; the plan counts it."""
    part = trained(base, work / "out", "llama_side", quant=True, checkpointing="all")
    assert all(name.startswith(("side.", "down.", "up.")) for name in load_file(part / "trainable.safetensors"))
    model = MetaModel.from_pretrained(part, dtype="fp32")
    prompt = model.prompt_tokens("What is it?")
    steps = generate_tokens(model.llma, [prompt], max_gen_len=6, max_seq_len=64, stop_ids=set())
    answer = [token for (token,) in steps]
    likeliest = model.logits(torch.tensor(prompt + answer), (len(prompt + answer),)).argmax(-1).tolist()
    assert likeliest[len(prompt) - 1 : -1] == answer
    test_base.test_initial_values_fit_the_parameters("side", ranks=2)
    with raises(
        ConfigError, match="llama_side: it leaves untrained what nf4_scales is there to train; use --llama_type"
    ):
        trained(base, work / "refused", "llama_side", quant=True, quant_type="nf4_scales")
    check_kept(method="side", quant="nf4")
    for recomputed in (0, 2 * MIDDLE.n_layers):
        check_total(method="side", quant="nf4", recomputed=recomputed)


def recall(base: Path, work: Path) -> None:
    """Trained beside 4 bits; the plan counts it."""
    trained(base, work / "out", "llama_recall", quant=True)
    test_base.test_initial_values_fit_the_parameters("recall", ranks=2)
    check_kept(method="recall", quant="nf4")
    check_total(method="recall", quant="nf4")


def prompt_tuning(base: Path, work: Path) -> None:
    """The rows are learned; documents share them, the questions being three."""
    losses = [float(line) for line in run("prompt_tuning.py", base)[0]]
    assert losses[-1] < 0.7 * losses[0], losses


def patches(base: Path, work: Path) -> None:
    """Trained with images, beside 4 bits; the features are the matrix's, and the answer depends on the image."""
    from PIL import Image

    matrix = torch.randn(24, 3 * 7 * 7) / 12
    (directory := work / "encoder").mkdir()
    (directory / "config.json").write_text('{"model_type": "patches", "image_size": 28, "patch": 7, "width": 24}')
    save_file({"weight": matrix}, directory / "model.safetensors")
    colours = ("red", "blue")
    for name in colours:
        Image.new("RGB", (40, 30), name).save(work / f"{name}.png")
    (settings := work / "peft.json").write_text('{"vision_tuning": true}')
    records = [{"instruction": "Which colour?", "output": name, "image": f"{name}.png"} for name in colours]
    part = trained(
        base, work / "out", "llama_patches_peft", records=records, quant=True, vision_path=directory,
        image_transform="padded_resize", llama_config=[settings],
    )  # fmt: skip
    names = {name for name in load_file(part / "trainable.safetensors") if "patches" in name}
    assert names == {"patches_proj.weight", "patches_proj.bias"}
    model = MetaModel.from_pretrained(part, dtype="fp32")
    pictures = [model.picture(work / f"{name}.png", "padded_resize") for name in colours]
    pixels = torch.stack([picture.pixels() for picture in pictures])
    cut = pixels.view(2, 3, 4, 7, 4, 7).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 147)
    torch.testing.assert_close(model.encoder.features(pictures), cut @ matrix.t(), atol=1e-4, rtol=0)
    first, second = model.compute_logits(["Which colour?"] * 2, images=pictures)
    assert (first - second).abs().max() > 1e-3


def two_choices(base: Path, work: Path) -> None:
    """The scores of whole documents' logits."""
    (each, share), script = run("two_choices.py", base)
    found, model = [], script["model"]
    for question, answer in script["CHOICES"]:
        asked, told = model.prompt_tokens(model.question(question)), model.tokenizer.encode(answer)
        ids = torch.tensor(asked + told)
        logs = model.logits(ids, (len(ids),)).double().log_softmax(-1)[len(asked) - 1 : -1]
        found.append(logs.gather(1, torch.tensor(told)[:, None]).mean().item())
    assert all(abs(float(one) - other) < 1e-3 for one, other in zip(each.split(), found, strict=True)), (each, found)
    assert float(share) == ((found[0] > found[1]) + (found[2] > found[3])) / 2


def run(script: str, base: Path) -> tuple[list[str], dict[str, Any]]:
    """The lines that a script prints, called with a base, and its names."""
    with mock.patch.object(sys, "argv", [script, str(base)]), redirect_stdout(StringIO()) as printed:
        names = runpy.run_path(script)
    return printed.getvalue().splitlines(), names


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
    groups.end_process()
