"""Models made of models: what is written computes what was there before, in whichever software loads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.checkpoint import save
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.run_record import with_base
from accessory.data.templates import format_prompt
from accessory.errors import AccessoryError, CheckpointError, ConfigError
from accessory.export import (
    PROBE_ANSWER,
    Destination,
    convert,
    export_adapter,
    logit_error,
    merge,
    open_base,
    open_whole,
    transformers_hint,
)
from accessory.meta import MetaModel
from accessory.parallel import groups
from accessory.tokenizer import open_tokenizer
from tests.checkpoint.trained import write_trained
from tests.model.families.matrix import GROUPED, OPT, SIZES, Reference, baichuan2, internlm, known

TOKENS = torch.arange(40) * 7 % 500
TOLERANCE = 2e-5  # of the largest logit, fp32
VOCABULARY = {"vocab_size": 512}
BASES = {
    "gpt_neox": known("gpt_neox", **SIZES | {"intermediate_size": 256, "initializer_range": 0.1} | VOCABULARY),
    "bloom": known("bloom", hidden_size=128, n_layer=2, n_head=4, initializer_range=0.1, **VOCABULARY),
    "biased": known("llama", **GROUPED | VOCABULARY, attention_bias=True, mlp_bias=True),
    "mistral": known("mistral", **GROUPED | VOCABULARY, sliding_window=None),
    "opt": known("opt", **OPT | VOCABULARY | {"max_position_embeddings": 32}, word_embed_proj_dim=128),
}


@pytest.fixture(scope="module", autouse=True)
def layout() -> Iterator[groups.Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()


@pytest.fixture(scope="module")
def base_of(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of `BASES` -> a checkpoint of it that transformers wrote, with the tiny model's tokenizer."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            BASES[name](made[name])
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(tiny_base / file, made[name])
        return made[name]

    return make


@pytest.fixture(scope="module")
def part(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NormBiasLoRA trained on the plain tiny model."""
    return write_trained(tiny_base, tmp_path_factory.mktemp("trained") / "part")


@pytest.fixture(scope="module")
def nf4_part(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, trained on it in NF4."""
    return write_trained(tiny_base, tmp_path_factory.mktemp("trained") / "part", "nf4")


@pytest.fixture(scope="module")
def packed(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model packed in NF4, in our own format."""
    target = tmp_path_factory.mktemp("packed") / "base"
    model, _ = open_base([tiny_base])
    Destination(dtype="fp32", quant_type="nf4").write(model, target)
    return target


def ours(*paths: Path, **options) -> Tensor:
    """Logits of a checkpoint here, [T, V] fp32."""
    return MetaModel.from_pretrained(list(paths), dtype="fp32", **options).logits(TOKENS, (len(TOKENS),))


@torch.no_grad()
def theirs(path: Path) -> Tensor:
    """The same of transformers, which must have found a place for every tensor, and a tensor for every place."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model(TOKENS[None]).logits[0]


def apart(first: Tensor, second: Tensor) -> float:
    """Largest difference, as a share of the largest logit."""
    return float((first - second).abs().max() / second.abs().max())


def written(
    paths: list[Path], target: Path, to: str = "hf", *, base: str | None = None, drop_biases: bool = False
) -> Path:
    """`paths` merged in fp32."""
    merge(paths, target, Destination(to, "fp32", gguf_type="f32"), base=base, drop_biases=drop_biases)
    return target


class TestMerge:
    """A trained part put into its base."""

    def test_every_matrix_is_the_sum(self, tiny_base: Path, part: Path, tmp_path: Path) -> None:
        """File against file: W + 6/4 B A under Hugging Face's names, in the rows' order of Hugging Face's base."""
        merged = load_file(written([part], tmp_path / "hf") / "model.safetensors")
        before, trained = load_file(tiny_base / "model.safetensors"), load_file(part / "trainable.safetensors")
        for their, our in (("self_attn.v_proj", "attention.wv"), ("mlp.down_proj", "feed_forward.w2")):
            name, lora = f"model.layers.1.{their}", f"layers.1.{our}"
            a, b = (trained[f"{lora}.lora_{x}.weight"].double() for x in "ab")
            expected = before[f"{name}.weight"].double() + 1.5 * b @ a
            torch.testing.assert_close(merged[f"{name}.weight"].double(), expected, rtol=1e-6, atol=1e-6)
            assert torch.equal(merged[f"{name}.bias"], trained[f"{lora}.bias"])
        assert torch.equal(merged["model.norm.weight"], trained["norm.weight"])
        assert torch.equal(merged["lm_head.weight"], before["lm_head.weight"])
        assert len(merged) == 21 + 14

    def test_transformers_computes_the_trained_model(self, part: Path, tmp_path: Path) -> None:
        """In fp32, to rounding, and far from the base."""
        expected = ours(part)
        assert apart(theirs(written([part], tmp_path / "hf")), expected) < TOLERANCE
        assert apart(ours(with_base([part])[0].path), expected) > 0.3

    @pytest.mark.parametrize("name", ["gpt_neox", "bloom"])
    def test_fused_families(self, base_of, name: str, tmp_path: Path) -> None:
        """q, k and v are trained apart and written in one."""
        trained = write_trained(base_of(name), tmp_path / "part")
        expected = ours(trained)
        assert apart(theirs(written([trained], tmp_path / "hf")), expected) < TOLERANCE
        assert apart(ours(base_of(name)), expected) > 0.1

    @pytest.mark.parametrize("to", ["accessory", "gguf", "upstream"])
    def test_other_formats(self, part: Path, to: str, tmp_path: Path) -> None:
        """With biases in all linears."""
        target = tmp_path / f"merged.{to}"
        assert apart(ours(written([part], target, to)), ours(part)) < TOLERANCE

    def test_shards_have_an_index(self, part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """No file above the limit but for a tensor that is; transformers finds them all."""
        monkeypatch.setattr(save, "SHARD_BYTES", 300_000)
        target = written([part], tmp_path / "hf")
        files = sorted(path.name for path in target.glob("*.safetensors"))
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        stored = {name: load_file(target / name) for name in files}
        assert index["weight_map"] == {name: file for file, tensors in stored.items() for name in tensors}
        sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in stored.values()]
        assert index["metadata"]["total_size"] == sum(sizes) and max(sizes) <= 300_000
        expected = ours(part)
        assert apart(theirs(target), expected) < TOLERANCE
        assert apart(ours(target), expected) < TOLERANCE

    def test_dequantized_is_what_was_trained(self, nf4_part: Path, tmp_path: Path) -> None:
        """Unasked, it is the model as trained; "full" is the same part on the base in full precision."""
        dequantized = ours(written([nf4_part], tmp_path / "dequantized", "accessory"))
        full = ours(written([nf4_part], tmp_path / "full", "accessory", base="full"))
        assert apart(dequantized, ours(nf4_part)) < TOLERANCE
        assert apart(full, ours(nf4_part, quant=False)) < TOLERANCE
        assert apart(full, dequantized) > 0.03

    @pytest.mark.parametrize("targets", [["wq", "w2"], []])
    def test_packed_base_becomes_plain(self, packed: Path, targets: list[str], tmp_path: Path) -> None:
        """Also where LoRA was beside some matrices, or none: transformers could not load a mixture."""
        trained = write_trained(packed, tmp_path / "part", "nf4", lora_targets=targets)
        target = written([trained], tmp_path / "hf")
        assert open_source(target).storage is None
        assert apart(theirs(target), ours(trained)) < TOLERANCE

    def test_dropped_biases(self, tiny_base: Path, part: Path, tmp_path: Path) -> None:
        """The model without those that training added; norms and LoRA are in it."""
        other = Path(shutil.copytree(part, tmp_path / "without"))
        values = load_file(part / "trainable.safetensors")
        zeroed = {name: value * 0 if name.endswith(".bias") else value for name, value in values.items()}
        save_file(zeroed, other / "trainable.safetensors")
        target = written([part], tmp_path / "hf", drop_biases=True)
        assert apart(theirs(target), ours(other)) < TOLERANCE
        assert apart(ours(part), ours(other)) > 0.1
        assert json.loads((target / "config.json").read_text())["attention_bias"] is False

    def test_biases_of_the_base_cannot_be_dropped(self, base_of, tmp_path: Path) -> None:
        """They were trained, too, and stay."""
        trained = write_trained(base_of("biased"), tmp_path / "part")
        assert apart(theirs(written([trained], tmp_path / "hf", drop_biases=True)), ours(trained)) < TOLERANCE

    def test_biases_without_a_place(self, base_of, tmp_path: Path) -> None:
        """Linears and way out are named; each way out works."""
        trained = write_trained(base_of("mistral"), tmp_path / "part")
        for to in ("hf", "meta"):
            with pytest.raises(CheckpointError) as caught:
                written([trained], tmp_path / "hf", to)
            said = str(caught.value)
            assert "qkv_bias True, out_bias True, mlp_bias True" in said
            assert "no place for the biases of wq, wk, wv, wo, w1, w2, w3" in said and "--drop_biases" in said
            assert sorted(path.name for path in tmp_path.iterdir()) == ["part"]
        as_llama = replace(Destination("hf", "fp32"), architecture="llama")
        merge([trained], tmp_path / "llama", as_llama, base=None, drop_biases=False)
        assert apart(theirs(tmp_path / "llama"), ours(trained)) < TOLERANCE
        dropped = written([trained], tmp_path / "dropped", drop_biases=True)
        assert json.loads((dropped / "config.json").read_text())["model_type"] == "mistral"
        theirs(dropped)

    def test_moved_base(self, tiny_base: Path, part: Path, tmp_path: Path) -> None:
        """Base and part by their places, the first of which run.json does not know."""
        moved = Path(shutil.copytree(tiny_base, tmp_path / "moved"))
        assert apart(ours(written([moved, part], tmp_path / "hf")), ours(part)) < TOLERANCE

    def test_model_saved_whole(self, part: Path, tmp_path: Path) -> None:
        """What a run without --only_save_trainable leaves holds its base."""
        target = written([saved_whole(part, tmp_path / "whole")], tmp_path / "hf")
        assert apart(theirs(target), ours(part)) < TOLERANCE

    @pytest.mark.parametrize(
        ("which", "base", "message"),
        [
            ("part", "dequantized", "was not trained on a quantized base; leave out --base dequantized"),
            ("packed_part", "full", "is a quantized base: its full weights are gone. Leave out --base full"),
            ("part", "quantized", "--base 'quantized' is neither full, dequantized nor packed"),
            ("base", "full", "cannot be merged: it is a llama, the base itself was trained"),
        ],
    )
    def test_refusals(
        self, tiny_base: Path, part: Path, packed: Path, which: str, base: str, message: str, tmp_path: Path
    ) -> None:
        """Before anything is written."""
        packed_part = write_trained(packed, tmp_path / "packed_part", "nf4")
        path = {"part": part, "packed_part": packed_part, "base": tiny_base}[which]
        with pytest.raises(AccessoryError, match=message):
            written([path], tmp_path / "out", base=base)
        assert [found.name for found in tmp_path.iterdir()] == ["packed_part"]


def saved_whole(part: Path, target: Path) -> Path:
    """A trained part and its base in one directory, as main_finetune.py writes them."""
    source, _, _ = open_whole([part])
    shutil.copytree(part, target)
    (target / "trainable.safetensors").unlink()
    save_file({name: tensor.read().clone() for name, tensor in source.tensors.items()}, target / "model.safetensors")
    return target


def written_by(write: Callable[[Path], Reference], tiny_base: Path, directory: Path) -> Reference:
    """What `write` makes in the new `directory`, with the tiny model's tokenizer beside it; returns its reference."""
    directory.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / file, directory)
    return write(directory)


class TestConvert:
    """A base in another format."""

    @pytest.mark.parametrize("to", ["accessory", "hf", "gguf", "meta", "upstream"])
    def test_bit_for_bit(self, tiny_base: Path, to: str, tmp_path: Path) -> None:
        """fp32 to fp32, but for the order of the rows of q and k."""
        target = tmp_path / f"out.{to}"
        convert([tiny_base], target, Destination(to, "fp32", "f32"))
        before, after = (open_base([path])[0].in_layout("pairs").tensors for path in (tiny_base, target))
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name].read(), tensor.read()) for name, tensor in before.items())
        assert apart(ours(target), ours(tiny_base)) < TOLERANCE

    @pytest.mark.parametrize(("dtype", "said"), [("bf16", "BF16"), ("fp16", "F16")])
    def test_dtype(self, tiny_base: Path, dtype: str, said: str, tmp_path: Path) -> None:
        """Of every tensor."""
        convert([tiny_base], tmp_path / "out", Destination("hf", dtype))
        with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {said}  # noqa: SIM118

    def test_normalized_head(self, tiny_base: Path, tmp_path: Path) -> None:
        """A Baichuan 2 with a vocabulary of any size becomes a LLaMA that needs no such head."""
        reference = written_by(baichuan2, tiny_base, tmp_path / "base")
        convert([tmp_path / "base"], tmp_path / "llama", Destination("hf", "fp32", architecture="llama"))
        assert apart(theirs(tmp_path / "llama"), reference.logits(TOKENS)) < TOLERANCE
        assert transformers_hint(tmp_path / "llama") is None

    def test_trained_parts_are_refused(self, part: Path, tmp_path: Path) -> None:
        """Alone, and in one directory with their base, where LoRA and biases would be lost in silence."""
        for path in (part, saved_whole(part, tmp_path / "whole")):
            for to in ("accessory", "hf"):
                with pytest.raises(CheckpointError, match=rf"{path}: .*merge it \(tools/merge.py\)"):
                    convert([path], tmp_path / "out", Destination(to))
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]

    def test_upstream_keeps_biases_beside_the_base(self, base_of, tmp_path: Path) -> None:
        """As trained ones, for want of another place; merging brings them back."""
        base = base_of("biased")
        convert([base], tmp_path / "upstream", Destination("upstream", "fp32"))
        assert apart(ours(tmp_path / "upstream"), ours(base)) < TOLERANCE
        with pytest.raises(CheckpointError, match=r"holds what was trained .* llama_peft.*merge it"):
            convert([tmp_path / "upstream"], tmp_path / "hf", Destination())
        assert apart(theirs(written([tmp_path / "upstream"], tmp_path / "hf")), theirs(base)) < TOLERANCE


class TestAdapter:
    """What was trained, for peft."""

    @pytest.fixture
    def stacked(self, tiny_base: Path, tmp_path: Path) -> list[Path]:
        """A base, LoRA and norms trained on it, and LoRA trained on from those, whose scale is another."""
        first = write_trained(tiny_base, tmp_path / "first", bias_tuning=False)
        second = write_trained(tiny_base, tmp_path / "second", bias_tuning=False, norm_tuning=False, lora_alpha=10)
        stored = load_file(second / "trainable.safetensors")
        save_file({name: -0.7 * value for name, value in stored.items()}, second / "trainable.safetensors")
        run = json.loads((second / "run.json").read_text())
        run["base"].append({"path": str(first), "format": "ours", "fingerprint": open_source(first).fingerprint()})
        (second / "run.json").write_text(json.dumps(run))
        return [tiny_base, first, second]

    def test_part_on_a_part(self, stacked: list[Path], tmp_path: Path) -> None:
        """One adapter holds the last part's tensors, and those of earlier parts that it lacks (here the norms)."""
        base, first, second = stacked
        expected = ours(second)
        for i, paths in enumerate(([second], stacked)):
            target = tmp_path / f"adapter{i}"
            assert export_adapter(paths, target, drop_biases=False) is None
            model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            model = peft.PeftModel.from_pretrained(model, target).eval()
            with torch.no_grad():
                assert apart(model(TOKENS[None]).logits[0], expected) < TOLERANCE
            assert apart(ours(base, target), expected) < TOLERANCE
        for other in ([base, first], [base]):
            assert apart(ours(*other), expected) > 0.1
        assert apart(theirs(written(stacked, tmp_path / "merged")), expected) < TOLERANCE

    def test_base_that_transformers_cannot_open(self, tiny_base: Path, tmp_path: Path) -> None:
        """The note says to give --base_model, after which there is no note."""
        own = tmp_path / "own"
        convert([tiny_base], own, Destination("accessory", "fp32"))
        part = write_trained(own, tmp_path / "part", bias_tuning=False)
        note = export_adapter([part], tmp_path / "adapter", drop_biases=False)
        assert note.startswith(
            f"adapter_config.json names the base {own}, which transformers cannot open as it is (Acc"
        )
        assert export_adapter([part], tmp_path / "named", drop_biases=False, base_name="me/base") is None
        config = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "me/base"

    def test_base_of_a_type_that_needs_code_of_its_own(self, tiny_base: Path, tmp_path: Path) -> None:
        """A note says that transformers knows no Baichuan, as for a written one; with auto_map it finds the code."""
        convert([tiny_base], tmp_path / "llama", Destination("hf", "fp32"))
        assert transformers_hint(tmp_path / "llama") is None
        base = tmp_path / "internlm"
        written_by(internlm, tiny_base, base)
        part = write_trained(base, tmp_path / "part", bias_tuning=False)
        said = export_adapter([part], tmp_path / "adapter", drop_biases=False)
        assert said.startswith(f"transformers knows no internlm of its own and cannot open {base} as it is: put ")
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "x.Y"}}))
        assert export_adapter([base, part], tmp_path / "again", drop_biases=False) is None

    def test_refusals(self, tiny_base: Path, part: Path, tmp_path: Path) -> None:
        """Anything but a base and trained parts."""
        whole = saved_whole(part, tmp_path / "whole")
        for paths in ([tiny_base], [tiny_base, whole], [whole]):
            with pytest.raises(CheckpointError, match="Expected a base and what was trained on it"):
                export_adapter(paths, tmp_path / "out", drop_biases=True)


class TestDestination:
    """Flags that cannot work are said to be wrong before any weight is read."""

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({"to": "ggfu"}, "--to 'ggfu' is unknown. Did you mean 'gguf'.* Known: accessory, hf, gptq, greenbit, g"),
            ({"dtype": "fp23"}, r"--dtype 'fp23' is unknown. Did you mean 'fp.*'\? Known: bf16, fp16, fp32"),
            ({"to": "meta", "ranks": 0}, "--model_parallel_size 0 is not a number of shards"),
            ({"to": "meta", "ranks": "two"}, "--model_parallel_size 'two' is not a number of shards"),
            ({"to": "gguf", "quant_type": "nf4"}, "--to gguf: packed weights are written as accessory, hf, gptq,"),
        ],
    )
    def test_unknown(self, flags: dict, message: str) -> None:
        """The nearest is named."""
        with pytest.raises(ConfigError, match=message):
            Destination(**flags)

    def test_gguf_is_told_by_its_name(self, tiny_base: Path, tmp_path: Path) -> None:
        """What could not be opened again is not written."""
        with pytest.raises(ConfigError, match=rf"{tmp_path}/model: .* one that ends in .gguf"):
            convert([tiny_base], tmp_path / "model", Destination("gguf"))
        assert not list(tmp_path.iterdir())

    def test_architecture(self, tiny_base: Path, tmp_path: Path) -> None:
        """Another model type, where it can express the model; the nearest to one that is unknown."""
        with pytest.raises(CheckpointError, match=r"--architecture: .*'lama' is not supported. Did you mean 'llama'"):
            convert([tiny_base], tmp_path / "out", Destination("hf", architecture="lama"))
        with pytest.raises(CheckpointError, match=r"A bloom config.json cannot express this model's .*position"):
            convert([tiny_base], tmp_path / "out", Destination("hf", architecture="bloom"))
        convert([tiny_base], tmp_path / "mistral", Destination("hf", "fp32", architecture="mistral"))
        assert apart(theirs(tmp_path / "mistral"), ours(tiny_base)) < TOLERANCE

    @pytest.mark.parametrize("to", ["accessory", "hf", "gguf", "meta", "upstream"])
    def test_what_is_there_stays(self, tiny_base: Path, to: str, tmp_path: Path) -> None:
        """Whatever the format."""
        target = tmp_path / f"out.{to}"
        if to == "gguf":
            target.write_text("precious")
        else:
            target.mkdir()
            (target / "precious").touch()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(CheckpointError, match=rf"{target}: found"):
            convert([tiny_base], target, Destination(to))
        assert sorted(tmp_path.rglob("*")) == before


class TestLogitError:
    """How far two models are apart."""

    def test_zero_for_the_same(self, part: Path) -> None:
        """Bit for bit."""
        found = logit_error([part], part, PROBE_ANSWER)
        assert (found.largest, found.mean, found.changed) == (0.0, 0.0, 0)

    def test_by_hand(self, tiny_base: Path, tmp_path: Path) -> None:
        """Against transformers' logits of the same text, for a head that has been changed."""
        changed = Path(shutil.copytree(tiny_base, tmp_path / "changed"))
        stored = load_file(tiny_base / "model.safetensors")
        stored["lm_head.weight"][:100] += 0.02 * torch.randn(100, 128, generator=torch.Generator().manual_seed(3))
        save_file(stored, changed / "model.safetensors")
        text = "What is Accessory? Answer in one line."
        ids = transformers.AutoTokenizer.from_pretrained(tiny_base)(text, add_special_tokens=False).input_ids
        ids = torch.tensor([[0, *ids]])
        with torch.no_grad():
            models = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in (tiny_base, changed)]
            first, second = (model(ids).logits[0].double() for model in models)
        found = logit_error([tiny_base], changed, text, "fp32")
        assert found.tokens == ids.shape[1]
        assert found.largest == pytest.approx(float((first - second).abs().max()), abs=1e-4) and found.largest > 0.1
        assert found.mean == pytest.approx(float((first - second).abs().mean()), abs=1e-5)
        assert found.changed == int((first.argmax(-1) != second.argmax(-1)).sum()) > 0
        assert str(found) == (
            f"logits differ by {found.largest:.4f} at most and {found.mean:.5f} on average over {found.tokens} probe "
            f"tokens; the likeliest next token is another at {found.changed} of them"
        )

    def test_padded_vocabulary(self, tiny_base: Path, tmp_path: Path) -> None:
        """Rows that only one of them has are left out."""
        padded = Path(shutil.copytree(tiny_base, tmp_path / "padded"))
        stored = load_file(tiny_base / "model.safetensors")
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            stored[name] = torch.cat([stored[name], torch.ones(8, 128)])
        save_file(stored, padded / "model.safetensors")
        config = json.loads((padded / "config.json").read_text())
        (padded / "config.json").write_text(json.dumps(config | {"vocab_size": 520}))
        assert logit_error([tiny_base], padded, PROBE_ANSWER, "fp32").largest < 1e-4

    def test_probe_is_asked_as_it_was_trained(self, tiny_base: Path, tmp_path: Path) -> None:
        part = write_trained(tiny_base, tmp_path / "part")
        run = json.loads((part / "run.json").read_text())
        counts = []
        for layout in ("alpaca", "none"):
            (part / "run.json").write_text(json.dumps(run | {"prompt_layouts": {layout: 9}}))
            counts.append(logit_error([part], part).tokens)
        tokenizer = open_tokenizer(tiny_base)
        words = len(tokenizer.encode(format_prompt("Why?"))) - len(tokenizer.encode("Why?"))
        assert counts[0] - counts[1] == words

    def test_probe_is_cut(self, base_of, tiny_base: Path) -> None:
        """To 256 tokens, and to what the model has positions for."""
        assert logit_error([tiny_base], tiny_base, PROBE_ANSWER * 9).tokens == 256
        assert logit_error([base_of("opt")], base_of("opt"), PROBE_ANSWER).tokens == 32

    def test_precision(self, tiny_base: Path) -> None:
        """An unknown one is named with the nearest."""
        with pytest.raises(ConfigError, match=r"--precision 'fp33' is unknown. Did you mean 'fp32'"):
            logit_error([tiny_base], tiny_base, PROBE_ANSWER, "fp33")
