"""Records are laid out as their shape, the chat template and the entry say; one that cannot be costs itself."""

from datetime import datetime

import pytest

from accessory.data.batch import IGNORE
from accessory.errors import DataError, TokenizerError
from accessory.tokenizer import Chat
from tests.data.corpora import CHAT, DROPPING, GOOD, conversation, make, same

START, END = 256, 257


def learned_text(corpus, tokenizer, index=0):
    tokens, labels = corpus.document(index)
    return tokens, tokenizer.decode(labels[labels != IGNORE].tolist())


def test_a_conversation_of_the_chat_template_is_told(write, chat_tokenizer):
    """Without a word of the user's; where the template is missing, it is a dialog."""
    turns = [("system", "Be brief."), ("human", "a"), ("gpt", "red")]
    path = write("x.json", [conversation(*turns)] * 2 + [conversation(*turns[1:])])
    corpus = make(path, chat_tokenizer())
    assert corpus.show(0) == "system\nBe brief.\nuser\na\nassistant\n«red<end>»"
    assert corpus.documents_by_prompt_layout() == {"chat": 3} and corpus.told.system == "Be brief."
    assert "shape sharegpt (conversations; told from the keys), laid out as chat" in corpus.report
    corpus = make(path, chat_tokenizer(None))
    assert corpus.show(0).startswith("Be brief.\n\n### Human: a\n### Assistant:« red\n###<end>»")
    assert corpus.told.layouts == ["dialog"]


def test_records_of_other_shapes_than_the_files_are_a_cause(write, tokenizer):
    path = write("x.jsonl", [GOOD, GOOD, {"prompt": "p", "completion": "c"}, {"colour": "red"}])
    report = make(path, tokenizer).report
    assert (
        "it has the shape prompt-completion, where the file's is alpaca: put those into a file of their own" in report
    )
    assert f"has no key 'instruction', only 'colour' ({path}:4)" in report


def test_a_record_is_laid_out_by_the_checkpoints_chat_template(write, chat_tokenizer):
    tokenizer = chat_tokenizer()
    write("x.json", [{"instruction": "q <|im_end|>", "input": "more", "output": " ab\n"}, GOOD])
    corpus = make(write("c.yaml", CHAT), tokenizer)
    tokens, learned = learned_text(corpus, tokenizer)
    prompt = Chat(tokenizer).ids([{"role": "user", "content": "q <|im_end|>\n\nmore"}])
    assert tokens.tolist() == [*prompt, *tokenizer.encode(" ab\n"), END] and learned == " ab\n"
    assert corpus.document(0)[1][-2] == END
    assert corpus.show(0) == "user\nq <|im_end|>\n\nmore\nassistant\n« ab\n<end>»"
    assert learned_text(corpus, tokenizer, 1)[1] == "ab"


def test_both_kinds_of_records_stay_apart(write, chat_tokenizer):
    tokenizer = chat_tokenizer()
    write("x.json", [GOOD, {"instruction": "w", "output": "cd"}])
    write("y.json", [{"instruction": f"{i}", "output": f"<{i}>"} for i in range(3)])
    entries = (
        "[{path: y.json, prompt_type: none}, {path: x.json, prompt_type: chat}, {path: y.json, prompt_type: none}]"
    )
    corpus = make(write("c.yaml", f"META: {entries}"), tokenizer)
    learned = [learned_text(corpus, tokenizer, index)[1] for index in range(len(corpus))]
    assert learned == ["<0>", "<1>", "<2>", "ab", "cd", "<0>", "<1>", "<2>"]
    assert corpus.document(0)[0][-1] == 258 and corpus.document(3)[0][-1] == END


def test_conversations_are_laid_out_by_the_template_too(write, chat_tokenizer):
    tokenizer = chat_tokenizer()
    turns = [("human", "a"), ("gpt", "red"), ("human", "b"), ("gpt", "green"), ("human", "bye")]
    write("x.json", [{"conversations": [{"from": role, "value": words} for role, words in turns]}])
    corpus = make(write("c.yaml", CHAT), tokenizer, dialog=True)
    assert corpus.show(0) == "user\na\nassistant\n«red<end>»\nuser\nb\nassistant\n«green<end>»"
    tokens, labels = corpus.document(0)
    assert tokens.tolist().count(START) == 4 and labels.tolist().count(END) == 2


def test_a_chat_without_template_is_refused_before_anything_is_read(write, chat_tokenizer):
    write("x.json", "not even JSON")
    with pytest.raises(TokenizerError, match=r"tokenizer.json: the checkpoint has no chat template"):
        make(write("c.yaml", CHAT), chat_tokenizer(None))


def test_a_record_the_template_refuses_costs_that_record(write, chat_tokenizer):
    template = "{% if messages[0].content == 'bad' %}{{ raise_exception('no bad') }}{% endif %}"
    tokenizer = chat_tokenizer(template + "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    path = write("x.json", [{"instruction": "bad", "output": "x"}, GOOD, {"instruction": "bad", "output": "y"}])
    config = write("c.yaml", CHAT)
    report = make(config, tokenizer).report
    assert report.startswith("1 documents") and "skipped 2: " in report and f"no bad). ({path}" in report
    with pytest.raises(DataError, match=r"2 of 3 records cannot be used, more than --max_skipped 0\.5"):
        make(config, tokenizer, max_skipped=0.5)


def test_turns_that_are_laid_out_anew_are_documents_of_their_own(write, chat_tokenizer):
    turns = [("human", "a"), ("gpt", "<think>1</think>red"), ("human", "b"), ("gpt", "<think>2</think>green")]
    path = write("x.jsonl", [conversation(*turns), conversation(*turns[:2])])
    corpus = make(write("c.yaml", CHAT.replace("x.json", "x.jsonl")), chat_tokenizer(DROPPING), dialog=True)
    assert [corpus.show(index) for index in range(len(corpus))] == [
        "user:aassistant:«<think>1</think>red<end>»",
        "user:aassistant:reduser:bassistant:«<think>2</think>green<end>»",
        "user:aassistant:«<think>1</think>red<end>»",
    ]
    assert [f"{path}:{line}" in corpus.where(index) for index, line in enumerate((1, 1, 2))] == [True] * 3


def test_what_tools_and_the_system_say_is_laid_out_and_not_learned(write, chat_tokenizer):
    turns = [("system", "s"), ("human", "a"), ("gpt", "look"), ("tool", "42"), ("gpt", "it is 42")]
    write("x.json", [conversation(*turns)])
    corpus = make(write("c.yaml", CHAT), chat_tokenizer(), dialog=True)
    assert corpus.show(0) == "system\ns\nuser\na\nassistant\n«look<end>»\ntool\n42\nassistant\n«it is 42<end>»"


def test_the_time_that_a_template_prints_is_the_clocks(write, chat_tokenizer):
    write("x.json", [GOOD])
    config, morning = write("c.yaml", CHAT), datetime(2024, 2, 29, 8, 30)
    for template, told in (("{{ strftime_now('%d %b %Y %H:%M') }}", "29 Feb 2024 08:30"), ("", "")):
        tokenizer = chat_tokenizer(template + "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
        one, same_time = (make(config, tokenizer, clock=morning) for _ in range(2))
        assert one.show(0) == f"{told}q«ab<end>»" and same(one, same_time)
        other = make(config, tokenizer, clock=morning.replace(minute=31))
        assert (other.fingerprint == one.fingerprint) is (template == "")


def test_a_chat_record_that_is_no_text_costs_that_record(write, chat_tokenizer):
    write("x.json", [{"instruction": "\ud800", "output": "a"}, {"instruction": "q", "output": " "}, GOOD])
    assert len(make(write("c.yaml", CHAT), chat_tokenizer())) == 1
