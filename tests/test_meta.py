"""MetaModel: published checkpoints in, logits, losses and text out, against transformers on tiny random models."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers

from accessory import meta
from accessory.data.batch import Inset, PackedBatch
from accessory.data.corpus import build_corpus
from accessory.data.templates import CHAT, DIALOG, PROMPT_LAYOUTS
from accessory.errors import AccessoryError, ConfigError, DataError
from accessory.meta import MetaModel
from accessory.parallel import groups
from accessory.quant.packed import PackedWeight

BYTES = 256
VOCABULARY = BYTES + 2  # every byte, then <s> and </s>
BOS, EOS = BYTES, BYTES + 1
TINY = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15,
}  # fmt: skip
FAMILY = {
    "grouped": {},
    "multi-head, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 24},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def layout() -> Iterator[groups.Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()


def write_tokenizer(directory: Path) -> None:
    """A tokenizer.json of single bytes with <s> and </s>, and the file that names them."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(special))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., transformers.PreTrainedModel]:
    """Changes to the tiny config -> a random model, saved with its tokenizer in `tmp_path`."""

    def make(kind: str = "Llama", seed: int = 0, **changes) -> transformers.PreTrainedModel:
        torch.manual_seed(seed)
        config = getattr(transformers, kind + "Config")(**{**TINY, **changes})
        model = getattr(transformers, kind + "ForCausalLM")(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start as ones and biases as zeros: make them count
                torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
        model.save_pretrained(tmp_path)
        write_tokenizer(tmp_path)
        return model

    return make


CHATML = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture
def model(checkpoint, tmp_path: Path) -> MetaModel:
    """The first of the family, loaded in fp32."""
    checkpoint()
    return MetaModel.from_pretrained(tmp_path, dtype="fp32")


def random_ids(*lengths: int) -> torch.Tensor:
    """Ids of packed documents."""
    return torch.randint(0, BYTES, (sum(lengths),), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("changes", FAMILY.values(), ids=FAMILY)
def test_logits_equal_transformers(checkpoint, tmp_path: Path, changes: dict) -> None:
    """Two packed documents of every setting of the block, to 1e-4 in fp32."""
    theirs = checkpoint(**changes)
    ours = MetaModel.from_pretrained(tmp_path, dtype="fp32")
    ids = random_ids(40, 17)
    found = ours.logits(ids, (40, 17))
    wanted = torch.cat([theirs(part[None]).logits[0] for part in ids.split((40, 17))])
    assert found.dtype == torch.float32
    assert wanted.std() > 0.3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_mistral_equals_transformers(checkpoint, tmp_path: Path) -> None:
    """The same block under another name."""
    theirs = checkpoint("Mistral", sliding_window=None, head_dim=16)
    ids = random_ids(20)
    found = MetaModel.from_pretrained(tmp_path, dtype="fp32").logits(ids, (20,))
    torch.testing.assert_close(found, theirs(ids[None]).logits[0], rtol=0, atol=1e-4)


def test_loss_is_the_sum_over_supervised_tokens(checkpoint, tmp_path: Path) -> None:
    """Of a packed batch with masked prompts, against transformers' logits and torch's cross-entropy."""
    theirs = checkpoint()
    ours = MetaModel.from_pretrained(tmp_path, dtype="fp32")
    ids, lengths = random_ids(12, 9), (12, 9)
    labels = torch.cat([torch.cat([part[1:], torch.tensor([-100])]) for part in ids.split(lengths)])
    labels[:5] = -100
    batch = PackedBatch(ids, labels, lengths, (0, 1), (0, 0))
    with torch.no_grad():
        logits = torch.cat([theirs(part[None]).logits[0] for part in ids.split(lengths)])
        loss = ours(batch)
    assert batch.supervised == 14
    wanted = F.cross_entropy(logits.double(), labels, reduction="sum")
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_scores_of_choices(checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 over transformers' whole logits, document by document; choices share a context."""
    theirs, ours = checkpoint().double(), MetaModel.from_pretrained(tmp_path, dtype="fp32")
    monkeypatch.setattr("accessory.model.scores.CHUNK", 4)
    context, choices = random_ids(20).tolist(), [random_ids(n).tolist() for n in (3, 1, 7)]
    for _ in range(3):  # what is likeliest after the context
        likely = context + (choices[3] if len(choices) > 3 else [])
        token = int(theirs(torch.tensor([likely])).logits[0, -1].argmax())
        choices[3:] = [[*likely[20:], token]]
    documents = []
    for number, (begin, choice) in enumerate([*((context, choice) for choice in choices), (context[5:9], choices[2])]):
        labels = [-100] * (len(begin) - 1) + choice + [-100]
        documents.append((np.array(begin + choice, np.int32), np.array(labels), number))
    batch = PackedBatch.pack(documents)
    assert len(batch.tokens) == 20 + 3 + 3 + 1 + 7 + 3 + 11  # the context once but for its last token
    found = {score.id: score for score in ours.score(batch)}
    for tokens, labels, number in documents:
        logits, labels = theirs(torch.from_numpy(tokens).long()[None]).logits[0], torch.from_numpy(labels)
        wanted = -F.cross_entropy(logits, labels, reduction="sum").item()
        greedy = bool((logits.argmax(-1) == labels)[labels >= 0].all())
        assert found[number].log_probability == pytest.approx(wanted, rel=1e-5)
        assert found[number][2:] == (int((labels >= 0).sum()), greedy)
    assert [found[number].greedy for number in range(5)] == [False, False, False, True, False]
    assert ours.score(PackedBatch.idle(0)) == []


class Stretched(torch.nn.Module):
    """An encoder of rows whose name is their height."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 64, generator=torch.Generator().manual_seed(1)))

    def forward(self, name: str) -> torch.Tensor:
        """[3, D]."""
        return self.weight * float(name)


def test_insets_stand_in_place_of_their_tokens(checkpoint, tmp_path: Path) -> None:
    """Against transformers, given the embeddings document by document; what they begin alike with is computed once."""
    theirs, ours = checkpoint(), MetaModel.from_pretrained(tmp_path, dtype="fp32")
    ours.encoder = Stretched()
    documents = []
    for number, (height, last) in enumerate((("1", 5), ("1", 9), ("-2", 5))):
        tokens = np.array([1, 0, 0, 0, 40, 41, 42, last], np.int32)
        labels = np.array([-100] * 6 + [last, -100])
        held = height if number else ours.encoder.weight.detach().clone()  # by value, and by name
        documents.append((tokens, labels, number, (Inset(1, 3, held),)))
    for named in (documents[:1], documents[1:]):
        batch = PackedBatch.pack(named)
        loss = ours(batch)
        wanted = 0
        for tokens, labels, number, _ in named:
            rows = theirs.get_input_embeddings()(torch.from_numpy(tokens).long())
            rows = torch.cat([rows[:1], ours.encoder("-2" if number == 2 else "1"), rows[4:]])
            logits = theirs(inputs_embeds=rows[None]).logits[0]
            wanted = wanted + F.cross_entropy(logits.double(), torch.from_numpy(labels), reduction="sum")
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    ours_gradient, theirs_gradient = (
        torch.autograd.grad(value, ours.encoder.weight)[0] for value in (loss, wanted)
    )  # fmt: skip
    torch.testing.assert_close(ours_gradient, theirs_gradient, rtol=1e-4, atol=1e-5)
    alone = sum(ours(PackedBatch.pack([document])) for document in documents)
    together = PackedBatch.pack([(*d[:3], (Inset(1, 3, "1" if d[2] < 2 else "-2"),)) for d in documents])
    assert sorted(together.shared) == [0, 1, 6] and len(together.insets) == 2
    assert ours(together).item() == pytest.approx(alone.item(), rel=1e-5)


def test_quantized_model_is_near_the_plain_one(checkpoint, tmp_path: Path) -> None:
    """--quant packs every linear of the blocks and nothing else; logits stay correlated, and are not the same."""
    checkpoint()
    plain, packed = (MetaModel.from_pretrained(tmp_path, dtype="fp32", quant=quant) for quant in (None, True))
    names = {name for name, m in packed.named_modules() if isinstance(m, PackedWeight)}
    assert len(names) == 2 * 7
    assert all(name.startswith("llma.layers.") for name in names)
    ids = random_ids(30)
    one, two = plain.logits(ids, (30,)), packed.logits(ids, (30,))
    assert 0.01 < (one - two).std() / one.std() < 0.5


def test_a_storage_format_alone_packs_the_base(checkpoint, tmp_path: Path) -> None:
    """quant_type without quant is not ignored."""
    checkpoint()
    model = MetaModel.from_pretrained(tmp_path, quant_type="int8")
    assert model.llma.layers[0].attention.wq.weight.name == "int8"


def test_asked_models_are_frozen(model: MetaModel) -> None:
    """No gradients, no dropout."""
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_dtype(checkpoint, tmp_path: Path) -> None:
    """bf16 unless said otherwise; norms stay in fp32; an unknown path is an error of ours."""
    checkpoint()
    narrow = MetaModel.from_pretrained(tmp_path)
    assert narrow.llma.layers[0].attention.wq.weight.dtype == torch.bfloat16
    assert narrow.llma.norm.weight.dtype == torch.float32
    with pytest.raises(AccessoryError, match="no such checkpoint"):
        MetaModel.from_pretrained(tmp_path / "absent")


def test_prompt_keeps_its_end(model: MetaModel) -> None:
    """BOS, then what fits with room for one new token; what does not is said."""
    assert model.prompt_tokens("ab") == [BOS, *model.tokenizer.encode("ab")]
    model.max_seq_len = 6
    with pytest.warns(UserWarning, match="The first 4 tokens of a prompt are left out: max_seq_len is 6"):
        assert model.prompt_tokens("abcdefgh") == [BOS, *model.tokenizer.encode("efgh")]


def test_an_answer_beyond_what_the_model_was_made_for_is_said(model: MetaModel) -> None:
    """The model has max_position_embeddings 256."""
    with pytest.warns(UserWarning, match="beyond the 256 tokens"):
        model.generate(["a" * 250], max_gen_len=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(["a" * 249], max_gen_len=6)


@torch.no_grad()
def test_generate_equals_transformers(checkpoint, tmp_path: Path) -> None:
    """Greedy answers to prompts of unequal length, as text."""
    theirs = checkpoint()
    ours = MetaModel.from_pretrained(tmp_path, dtype="fp32")
    prompts = ["Hello", "Every byte is a token.", "x"]
    answers = ours.generate(prompts, max_gen_len=12)
    for prompt, answer in zip(prompts, answers, strict=True):
        start = torch.tensor([ours.prompt_tokens(prompt)])
        full = theirs.generate(start, max_new_tokens=12, do_sample=False, eos_token_id=EOS, pad_token_id=EOS)
        assert answer == ours.tokenizer.decode(full[0, start.shape[1] :].tolist())
        assert answer


def test_half_a_character_is_held_back(model: MetaModel) -> None:
    """Each text is whole but the last, which is `generate`'s whatever it ends in, and none is shown twice."""
    seen_half = False
    for prompt in ("Hello", "What?", "1 2 3", "é"):
        for length in (1, 2, 3, 10):
            texts = list(model.stream_generate(prompt, max_gen_len=length))
            (whole,) = model.generate([prompt], max_gen_len=length)
            assert texts[-1] == whole
            assert not any(text.endswith("\N{REPLACEMENT CHARACTER}") for text in texts[:-1])
            assert len(texts) <= length
            seen_half |= whole.endswith("\N{REPLACEMENT CHARACTER}")
    assert seen_half  # a random model of bytes ends in half a character now and then


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_is_generate(model: MetaModel, temperature: float) -> None:
    """Greedy and sampled with the same seed; another seed samples something else."""
    options = {"max_gen_len": 20, "temperature": temperature, "top_p": 0.9}
    (whole,) = model.generate(["Hello"], seed=5, **options)
    assert list(model.stream_generate("Hello", seed=5, **options))[-1] == whole
    (other,) = model.generate(["Hello"], seed=6, **options)
    assert (other == whole) == (temperature == 0)


def test_empty_prompt_without_bos_is_refused(model: MetaModel) -> None:
    """There is nothing to continue; with BOS there is."""
    assert len(model.generate([""], max_gen_len=2)) == 1
    model.tokenizer.start_ids = ()
    with pytest.raises(ConfigError, match="A prompt has 0 tokens"):
        model.generate([""], max_gen_len=2)


@pytest.mark.parametrize("layout", PROMPT_LAYOUTS)
def test_a_question_is_asked_in_the_tokens_training_laid_out(
    checkpoint, tmp_path: Path, tiny_base: Path, layout: str
) -> None:
    """Every layout: what stands before the first learned token."""
    checkpoint(vocab_size=512)
    shutil.copy(tiny_base / "tokenizer.json", tmp_path)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    model = MetaModel.from_pretrained(tmp_path, dtype="fp32")
    record = {"instruction": "What is QST?", "input": "In Accessory", "output": "A side network."}
    if layout == DIALOG:
        words = "What is QST?\n\nIn Accessory"
        record = {"conversations": [{"from": "human", "value": words}, {"from": "gpt", "value": "A side network."}]}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    kind = CHAT if layout == CHAT else "alpaca" if layout == DIALOG else layout
    (tmp_path / "data.yaml").write_text(f"META: [{{path: data.json, prompt_type: {kind}}}]")
    corpus = build_corpus(tmp_path / "data.yaml", model.tokenizer, max_words=400, dialog=layout == DIALOG)
    assert corpus.documents_by_prompt_layout() == {layout: 1}
    before = corpus.tokens[: corpus.learned.argmax()].tolist()
    assert model.prompt_tokens(model.question("What is QST?", "In Accessory", layout)) == before
    if layout == DIALOG:
        record["conversations"].insert(0, {"from": "system", "value": "Be brief."})
        (tmp_path / "data.json").write_text(json.dumps([record]))
        corpus = build_corpus(tmp_path / "data.json", model.tokenizer, max_words=400, dialog=True)
        model.prompt_layouts, model.system = tuple(corpus.told.layouts), corpus.told.system
        before = corpus.tokens[: corpus.learned.argmax()].tolist()
        assert model.prompt_tokens(model.question("What is QST?", "In Accessory")) == before


def test_an_answer_in_a_dialog_ends_with_its_turn(model: MetaModel, monkeypatch) -> None:
    """A model trained on conversations would go on with the next turn; that is neither shown nor computed."""
    said = [*model.tokenizer.encode(" Paris.\n# 1\n### Human: more"), EOS]
    computed = []
    monkeypatch.setattr(meta, "generate_tokens", lambda *_, **__: ([computed.append(token) or token] for token in said))
    prompt = model.question("q", prompt_layout=DIALOG)
    assert model.generate([prompt], max_gen_len=30) == ["Paris.\n# 1"]
    assert len(computed) == len(" Paris.\n# 1\n###")
    texts = list(model.stream_generate(prompt, max_gen_len=30))
    assert texts[-1] == "Paris.\n# 1"
    assert not any(text.endswith(("\n", "\n#", "\n##")) for text in texts)  # what may be the turn's end is held back
    assert "Human: more" in model.generate(["q"], max_gen_len=30)[0]


def test_texts_that_end_an_answer(model: MetaModel, monkeypatch) -> None:
    """The first one that comes, over the bounds of tokens; the rest of a batch goes on; nothing of it is shown."""
    said = [[*model.tokenizer.encode(words)] for words in ("Paris\n\nUser: more", "Ro.me", "Us User")]

    def steps(*_, stopped, **__):
        for place in range(18):
            over = stopped() if stopped else ()
            yield [words[place] if place < len(words) and n not in over else None for n, words in enumerate(said)]

    monkeypatch.setattr(meta, "generate_tokens", steps)
    how = {"max_gen_len": 30, "stop": ["User:", "\n\nU", "."]}
    assert model.generate(["a", "b", "c"], **how) == ["Paris", "Ro", "Us User"]
    in_one = model.tokenizer.encode("x. y User: z")
    assert model._text(False, in_one, ("User:", ".")) == ("x", True)
    said = said[:1]
    texts = list(model.stream_generate("a", **how))
    assert texts == ["P", "Pa", "Par", "Pari", "Paris"]
    assert list(model.stream_generate("a", max_gen_len=30, stop="User:"))[-2:] == ["Paris\n", "Paris\n\n"]
    with pytest.raises(ConfigError, match=r"'stop\.0' is '': String should have at least 1 character"):
        model.generate(["a"], stop=[""])


def test_several_answers_to_one_prompt(model: MetaModel) -> None:
    """Those of as many seeds, however many are asked for."""
    how = {"max_gen_len": 8, "temperature": 1.0, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1}
    found = model.answers("What?", 3, seed=5, **how)
    assert found == [model.generate(["What?"], seed=seed, **how)[0] for seed in (5, 6, 7)]
    assert found[:1] == model.answers("What?", 1, seed=5, **how)
    with pytest.raises(ConfigError, match="count is 0; expected a number of answers"):
        model.answers("What?", 0)


@pytest.mark.parametrize(("dtype", "width"), [
    (torch.bfloat16, torch.bfloat16), ("bfloat16", torch.bfloat16), ("torch.float32", torch.float32),
    (torch.float16, torch.float16), ("fp16", torch.float16),
])  # fmt: skip
def test_dtype_by_any_of_its_names(checkpoint, tmp_path: Path, dtype: str | torch.dtype, width: torch.dtype) -> None:
    checkpoint()
    assert MetaModel.from_pretrained(tmp_path, dtype=dtype).llma.layers[0].attention.wq.weight.dtype == width


def test_settings_and_tokenizer_by_name(checkpoint, tmp_path: Path) -> None:
    """One path where several may stand, and texts for paths."""
    checkpoint()
    settings = tmp_path / "more.json"
    settings.write_text('{"rope_theta": 5000.0}')
    names = {"llama_config": str(settings), "tokenizer_path": str(tmp_path)}
    model = MetaModel.from_pretrained(
        str(tmp_path), **names, with_visual=False, mp_group=None
    )  # as upstream's users do
    assert model.llma.args.rope_theta == 5000.0
    assert MetaModel.from_pretrained((tmp_path,), llama_config=[str(settings)]).llma.args.rope_theta == 5000.0


def test_the_device(checkpoint, tmp_path: Path) -> None:
    """By default CUDA where there is any, else the CPU; logits are returned on the device of the tokens."""
    checkpoint()
    place = "cuda" if torch.cuda.is_available() else "cpu"
    assert MetaModel.from_pretrained(tmp_path).llma.norm.weight.device.type == place
    model = MetaModel.from_pretrained(tmp_path, device=torch.device("cpu"))
    assert model.llma.norm.weight.device.type == "cpu"
    assert model.logits(random_ids(3), (3,)).device.type == "cpu"
    if place == "cpu":
        with pytest.raises(AccessoryError, match="--device cuda: PyTorch sees no CUDA device here"):
            MetaModel.from_pretrained(tmp_path, device="cuda:1")


@pytest.mark.parametrize(("wrong", "said"), [
    ({"dtype": torch.int8}, r"dtype torch.int8 is unknown. Known: bf16, fp16"),
    ({"dtype": "bf61"}, r"dtype 'bf61' is unknown. Did you mean 'bf16'\?"),
    ({"quant": "int8"}, "quant is 'int8'; expected True, False or None: the format is named by quant_type"),
    ({"device": "gpu"}, "--device 'gpu' is not one of auto, cpu, cuda"),
    ({"llama_config": "absent.json"}, "absent.json: cannot be read"),
    ({"llama_config": {"dimm": 3}}, r"llama_config: unknown key 'dimm'. Did you mean 'dim'\?"),
    ({"llama_config": 3}, "llama_config is 3; expected a file, settings, or a list of some"),
    ({"llama_config": [3]}, "a path is 3; expected a text or a Path, or a list of some"),
    ({"llama_type": 5, "max_seq_len": 0}, "(?s)'llama_type' is 5: .*'max_seq_len' is 0: Input should be greater than"),
    ({"quant_type": 4}, "MetaModel: 'quant_type' is 4: Input should be a valid string"),
    ({"tokenizer_path": 5}, "'tokenizer_path' is 5: Input is not a valid path"),
    ({"mp_group": 1, "with_visual": True}, r"(?s)'mp_group': layout=groups.start.*'with_visual': there is no vision"),
    ({"torch_dtype": "bf16", "load_in_4bit": True},
     r"(?s)'torch_dtype': dtype takes.*'load_in_4bit': quant keeps .* of quant_type"),
    ({"divice": "cpu"}, r"from_pretrained: unknown argument 'divice'. Did you mean 'device'"),
])  # fmt: skip
def test_wrong_arguments(checkpoint, tmp_path: Path, wrong: dict, said: str) -> None:
    checkpoint()
    with pytest.raises(AccessoryError, match=said):
        MetaModel.from_pretrained(tmp_path, **wrong)
    for nothing in ("", [], None):
        with pytest.raises(ConfigError, match=r"pretrained_path is .*; expected a checkpoint|a path is None; expected"):
            MetaModel.from_pretrained(nothing)


@pytest.mark.parametrize(("wrong", "said"), [
    ({"temperature": -1.0, "top_p": 2}, r"(?s)'temperature' is -1.0: .*'top_p' is 2: "),
    ({"top_p": 0}, "'top_p' is 0: "),
    ({"temperature": float("nan")}, "'temperature' is nan: "), ({"seed": None}, "'seed' is None: "),
    ({"max_gen_len": None}, "'max_gen_len' is None: Input should be a valid integer"),
    ({"max_new_tokens": 5}, "unknown key 'max_new_tokens': max_gen_len is the longest answer"),
    ({"num_gpus": 2}, "unknown key 'num_gpus': torchrun starts the processes: torchrun --nproc-per-node=N"),
    ({"images": "a.png"}, "unknown key 'images': there is no vision part yet"),
    ({"return_logits": True}, r"unknown key 'return_logits': compute_logits\(prompt\)"),
    ({"stop_strings": "a", "sed": 1}, r"(?s)'stop_strings': stop are .*unknown key 'sed'. Did you mean 'seed'"),
])  # fmt: skip
def test_wrong_ways_to_answer(model: MetaModel, wrong: dict, said: str) -> None:
    """A negative temperature was no sampling, a top_p beyond 1 all tokens, without a word."""
    with pytest.raises(ConfigError, match=said):
        model.generate(["q"], **wrong)
    with pytest.raises(ConfigError, match=said):
        list(model.stream_generate("q", **wrong))


def test_upstreams_arguments_of_generate_unset(model: MetaModel) -> None:
    """As its users' scripts give them, for a model without vision."""
    unset = {"images": None, "return_logits": False, "max_gen_len": 4}
    assert model.generate(["q"], **unset) == model.generate(["q"], max_gen_len=4)
    assert list(model.stream_generate("q", image=None, max_gen_len=4))[-1] == model.generate("q", max_gen_len=4)


def test_what_is_no_question(model: MetaModel) -> None:
    """None was laid out as the text "None"."""
    for wrong in ((None,), (["q"],), ("q", 3)):
        with pytest.raises(ConfigError, match=r"(question|context) is (None|\['q'\]|3); expected a text"):
            model.question(*wrong)


@pytest.mark.parametrize(
    "prompts", [[3], [["a", "b"]], [[]], None, iter(["a"]), {"a": 1}], ids=lambda given: type(given).__name__
)
def test_what_is_no_prompt(model: MetaModel, prompts: object) -> None:
    """Of what is read once, nothing would be left to answer."""
    with pytest.raises(ConfigError, match=r"expected a prompt, or a list of them|expected a text, a list of messages"):
        model.generate(prompts)


def test_one_prompt_has_one_answer(checkpoint, tmp_path: Path) -> None:
    """In each form of a prompt, and with the options of a list of them."""
    checkpoint(vocab_size=VOCABULARY)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHATML}))
    model = MetaModel.from_pretrained(tmp_path, dtype="fp32")
    how = {"max_gen_len": 5, "temperature": 1.0, "seed": 3}
    messages = [{"role": "user", "content": "q"}]
    for prompt in ("Hello", messages, model.question("q", prompt_layout=DIALOG)):
        assert model.generate(prompt, **how) == model.generate([prompt], **how)[0] != ""


def test_logits_of_examples(model: MetaModel) -> None:
    """Of texts and of ids, one or many, with or without what begins and ends a document."""
    texts = ["Hello", "é?"]
    found = model.compute_logits(texts)
    for text, logits in zip(texts, found, strict=True):
        ids = torch.tensor(model.prompt_tokens(text))
        torch.testing.assert_close(logits, model.logits(ids, (len(ids),)), rtol=1e-5, atol=1e-5)
        assert torch.equal(model.compute_logits(text), model.compute_logits(ids))
        assert torch.equal(model.compute_logits(ids.tolist()), model.compute_logits([ids.tolist()])[0])
    assert model.compute_logits("Hello", bos=False, eos=True).shape == (6, VOCABULARY)
    assert model.compute_logits([]) == []
    for wrong, said in (
        ([[]], r"example 0 has the tokens \[\]; expected one or more of 0 to 257"),
        (["a", [1, 258]], "example 1 has the tokens"),
        (3, "examples are 3; expected a text or ids"),
        ([1.5], "examples are"),
    ):
        with pytest.raises(DataError, match=said):
            model.compute_logits(wrong)


def test_examples_are_evaluated(checkpoint, tmp_path: Path) -> None:
    """Against float64 over transformers' logits; the answer that the model gives is the likeliest, token for token."""
    theirs, ours = checkpoint().double(), MetaModel.from_pretrained(tmp_path, dtype="fp32")
    likely = theirs.generate(torch.tensor([ours.prompt_tokens("Hello")]), max_new_tokens=3, do_sample=False)[0].tolist()
    examples, contexts = [ours.prompt_tokens("Hello you"), likely], [ours.prompt_tokens("Hello")] * 2
    found = ours.evaluate_examples(examples, contexts)
    for place, (ids, known) in enumerate(((examples[0], 6), (likely, 6))):
        each = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)[range(known - 1, len(ids) - 1), ids[known:]]
        assert found["log_likelihood"][place] == pytest.approx(each.sum().item(), rel=1e-5)
        assert found["ppl"][place] == pytest.approx(each.mean().neg().exp().item(), rel=1e-5)
        assert found["non_context_logits"][place].shape == (len(ids) - known, VOCABULARY)
    assert found["max_equal"] == [False, True]
    alone = ours.evaluate_examples("Hello you", "Hello")
    assert alone["log_likelihood"] == pytest.approx(found["log_likelihood"][0], rel=1e-6)
    whole = ours.evaluate_examples(["Hello you"], eos=True)
    assert whole["non_context_logits"][0].shape == (10, VOCABULARY)
    for wrong, said in (
        ((["Hello"], ["Help"]), "example 0 has 6 tokens and its context 5, of which it begins with 4"),
        ((["Hello"], ["Hello"]), "example 0 has 6 tokens and its context 6, of which it begins with 6"),
        ((["Hello"], "Hello"), "expected one for each of the 1 examples"),
    ):
        with pytest.raises(DataError, match=said):
            ours.evaluate_examples(*wrong)


def test_a_model_in_training_is_asked_without_dropout(checkpoint, tmp_path: Path) -> None:
    """And trained on as before; a stream that nobody reads to its end leaves it so, too."""
    checkpoint()
    lora = {"lora_rank": 4, "lora_dropout": 0.9}
    how = {"dtype": "fp32", "llama_type": "llama_peft", "llama_config": lora}
    model = MetaModel.from_pretrained(tmp_path, train=True, **how)
    with torch.no_grad():
        for name, parameter in model.get_trainable_params().items():
            parameter.add_(torch.randn(parameter.shape) * 0.3 * ("lora_b" in name))
    wanted = model.eval().generate("Hello", max_gen_len=8)
    assert model.train().generate("Hello", max_gen_len=8) == wanted
    assert model.training
    for _ in model.stream_generate("Hello", max_gen_len=8):
        break
    assert model.training and model.llma.layers[0].training
