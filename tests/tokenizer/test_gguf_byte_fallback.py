"""Directories like Llama 2's (a tokenizer.json made of a sentencepiece model) as GGUF, read by llama.cpp and again."""

import copy
import io
import json

import pytest
import sentencepiece
from transformers import AutoTokenizer, LlamaTokenizer

from accessory.errors import TokenizerError
from accessory.tokenizer import Chat, open_tokenizer
from accessory.tokenizer.gguf_differences import differences
from accessory.tokenizer.gguf_fields import vocabulary_fields
from accessory.tokenizer.transformers_files import save_for_transformers
from tests.texts import mixed_texts
from tests.tokenizer.gguf_files import write_fields

CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
FORMS = {
    "Llama 2": {"normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, "pre_tokenizer": None},
    "no blank before a text": {"normalizer": REPLACE, "pre_tokenizer": None},
    "Mistral 0.3": {"normalizer": None, "pre_tokenizer": {**METASPACE, "prepend_scheme": "first"}},
    "always": {"normalizer": None, "pre_tokenizer": {**METASPACE, "prepend_scheme": "always"}},
    "never": {"normalizer": None, "pre_tokenizer": {**METASPACE, "prepend_scheme": "never"}},
}
DIFFERENCES = {
    "Mistral 0.3": [
        "puts a blank before a text that begins",
        "puts a blank before text that follows a control or added",
    ],
    "always": ["puts a blank before a text that begins"],
}
TEXTS = mixed_texts(300)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The tokenizer.json that transformers makes of a sentencepiece model of 1,500 pieces."""
    directory, model = tmp_path_factory.mktemp("spm"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text for text in mixed_texts(3000, seed=1) if "\n" not in text), model_writer=model,
        model_type="bpe", vocab_size=1500, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_by_whitespace=True, allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    LlamaTokenizer.from_pretrained(directory).save_pretrained(directory / "made")
    made = json.loads((directory / "made" / "tokenizer.json").read_text(encoding="utf-8"))
    made["model"]["unk_token"] = "<unk>"
    return made


def lay(directory, pipeline, **changes):
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps({**pipeline, **changes}), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps({**CONFIG, "add_bos_token": True}))
    return open_tokenizer(directory)


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_the_same_everywhere(pipeline, llama_cpp, tmp_path, form):
    """In transformers, here, in llama.cpp, and here from GGUF; some forms differ on texts that begin with a blank."""
    ours = lay(tmp_path / "hf", pipeline, **FORMS[form])
    path = write_fields(tmp_path / "v.gguf", ours, 1510)
    texts = [text for text in TEXTS if form not in DIFFERENCES or not text.startswith((" ", "▁"))]
    ids = ours.encode_batch(texts)
    assert ids == AutoTokenizer.from_pretrained(tmp_path / "hf")(texts, add_special_tokens=False).input_ids
    found = llama_cpp.ask(path, texts=texts, ids=range(1510))
    assert found["texts"] == ids
    assert (found["opening"], found["ends"]) == ([ours.bos_id], [ours.eos_id])
    again = open_tokenizer(path)
    assert again.encode_batch(texts) == ids
    assert (again.start_ids, again.stop_ids) == (ours.start_ids, ours.stop_ids)
    said = differences(ours)
    assert len(said) == len(DIFFERENCES.get(form, ()))
    assert all(line.startswith(words) for line, words in zip(said, DIFFERENCES.get(form, ()), strict=True))


def test_runs_of_blanks_that_score_alike(pipeline, llama_cpp, tmp_path):
    """As LLaMA's do; transformers 4 then puts the longest left parts first, whatever token they are of."""
    made = copy.deepcopy(pipeline)
    merges = [tuple(merge) for merge in made["model"]["merges"]]
    blank = [merge for merge in merges if {*"".join(merge)} == {"▁"}]
    blank.sort(key=lambda merge: (len(merge[0]), len(merge[1])), reverse=True)
    made["model"]["merges"] = [*(merge for merge in merges if merge not in blank), *blank]
    assert len({"".join(merge) for merge in blank}) > 2 and len({left for left, _ in blank}) > 2
    ours = lay(tmp_path / "hf", made, **FORMS["Llama 2"])
    texts = [f"{' ' * size}{text}{' ' * (size % 7)}" for size, text in enumerate(TEXTS[:60])]
    path = write_fields(tmp_path / "v.gguf", ours, 1510)
    assert llama_cpp.ask(path, texts=texts)["texts"] == ours.encode_batch(texts)


def test_the_model_beside_is_what_merges_cannot_say(llama_cpp, spm_model, tmp_path):
    """A tokenizer.json that cuts out user-defined pieces, as ours for transformers does."""
    (tmp_path / "tokenizer.model").write_bytes(spm_model)
    save_for_transformers(open_tokenizer(tmp_path), tmp_path / "hf")
    ours = open_tokenizer(tmp_path / "hf")
    path = write_fields(tmp_path / "v.gguf", ours, 420)
    assert llama_cpp.ask(path, texts=TEXTS)["texts"] == ours.encode_batch(TEXTS)
    assert differences(ours) == ["puts a blank before text that follows a control or added token"]
    (tmp_path / "hf" / "tokenizer.model").unlink()
    with pytest.raises(TokenizerError, match="changes or cuts text in a way of its own"):
        vocabulary_fields(open_tokenizer(tmp_path / "hf"), 420)


@pytest.mark.parametrize("form", ["Llama 2", "no blank before a text", "tokenizer.model"])
def test_a_conversation_and_new_tokens(pipeline, spm_model, llama_cpp, tmp_path, form):
    """Text between control tokens becomes llama.cpp's ids, read from Hugging Face's files or from GGUF."""
    if form in FORMS:
        lay(tmp_path, pipeline, **FORMS[form])
    else:
        (tmp_path / "tokenizer.model").write_bytes(spm_model)
    template = "<s>{% for m in messages %}<|user|>{{ m.content }}<|end|>\n{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**CONFIG, "chat_template": template}))
    ours = open_tokenizer(tmp_path).with_added_tokens(["<|user|>", "<|end|>"])
    path = write_fields(tmp_path / "v.gguf", ours, 1510)
    again = open_tokenizer(path)
    asked = [[{"role": "user", "content": text}, {"role": "user", "content": "b"}] for text in TEXTS]
    ids = [Chat(ours).ids(messages) for messages in asked]
    assert [Chat(again).ids(messages) for messages in asked] == ids
    rendered = [f"<s><|user|>{text}<|end|>\n<|user|>b<|end|>\n" for text in TEXTS]
    assert llama_cpp.ask(path, marked=rendered)["marked"] == ids


def put_last(merges):
    """The first merge that is followed by another one of its token."""
    merges.append(merges.pop(next(i for i, merge in enumerate(merges) if "".join(merge) == "".join(merges[i + 1]))))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda made: made["model"]["merges"].pop(700),
            "no scores of tokens give the order of its merges .no merge joins",
        ),
        (lambda made: put_last(made["model"]["merges"]), "the merges of a token lie apart"),
        (lambda made: made["model"]["vocab"].update({"<0x41>!": made["model"]["vocab"].pop("<0x41>")}), "all 256"),
        (lambda made: made.update(normalizer={"type": "NFKC"}), "changes or cuts text in a way of its own"),
        (lambda made: made.update(pre_tokenizer={**METASPACE, "split": True}), "changes or cuts text in a way"),
        (lambda made: made["model"].update(dropout=0.1), r"settings that GGUF cannot state \(dropout\)"),
    ],
)
def test_what_scores_cannot_say_is_refused(pipeline, tmp_path, change, words):
    made = copy.deepcopy(pipeline)
    change(made)
    with pytest.raises(TokenizerError, match=words):
        vocabulary_fields(lay(tmp_path, made), 1510)


def test_user_defined_tokens_are_matched_before_blanks_are_replaced(llama_cpp, tmp_path, spm_model):
    """As llama.cpp wants them, who puts a blank behind each, though, where sentencepiece does not."""
    (tmp_path / "tokenizer.model").write_bytes(spm_model)
    added = {"420": {"content": "<a b>", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    ours = open_tokenizer(tmp_path)
    path = write_fields(tmp_path / "v.gguf", ours, 421)
    assert open_tokenizer(path).encode("the <a b>") == ours.encode("the <a b>")
    assert llama_cpp.ask(path, texts=["the <a b>"])["texts"] == [ours.encode("the <a b>")]
    assert 420 in ours.encode("the <a b>")
