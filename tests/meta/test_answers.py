"""Questions in the tokens of training; whole answers and streams of them, against transformers' `generate`."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from accessory.data.corpus import build_corpus
from accessory.data.templates import CHAT, DIALOG, PROMPT_LAYOUTS
from accessory.errors import ConfigError
from accessory.meta import MetaModel, answers
from tests.meta.byte_models import BOS, CHATML, EOS


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
    monkeypatch.setattr(
        answers, "generate_tokens", lambda *_, **__: ([computed.append(token) or token] for token in said)
    )
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

    monkeypatch.setattr(answers, "generate_tokens", steps)
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


def test_what_is_no_question(model: MetaModel) -> None:
    """None was laid out as the text "None"."""
    for wrong in ((None,), (["q"],), ("q", 3)):
        with pytest.raises(ConfigError, match=r"(question|context) is (None|\['q'\]|3); expected a text"):
            model.question(*wrong)


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
