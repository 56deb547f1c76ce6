"""Files laid out as their publishers lay them out: what is learned of each, written out by hand and by transformers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from accessory.data.corpus import Corpus, build_corpus
from accessory.data.templates import DIALOG_SYSTEM
from accessory.errors import DataError

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n%s\n\n### Response:«%s<end>»"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n%s\n\n### Input:\n%s\n\n### Response:«%s<end>»"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}


@dataclass
class File:
    """A file, the shape and layout that are told of it, and its documents as `Corpus.show` shows them.

    entry: further keys of its entry in a YAML. messages, tools: what transformers is given. masked: whether it learns
    the same; else only its tokens are compared.
    """

    name: str
    content: object
    shape: str
    layout: str
    documents: list[str]
    entry: str = ""
    messages: list[dict] = field(default_factory=list)
    tools: list[dict] | None = None
    masked: bool = True


def said(*pairs: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": words} for role, words in pairs]


def shared(*pairs: tuple[str, str]) -> list[dict]:
    return [{"from": who, "value": words} for who, words in pairs]


TURNS = said(("user", "a?"), ("assistant", "a!"), ("user", "b?"), ("assistant", "b!"))
TWO = "user\na?\nassistant\n«a!<end>»\nuser\nb?\nassistant\n«b!<end>»"
CALLED = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]
CALLED_SHOWN = (
    f"system\n{json.dumps(TOOL)}\nuser\n1 + 2?\nassistant\n«<call>{json.dumps(CALL)}</call><end>»\ntool\n3\n"
    "assistant\n«It is 3.<end>»"
)
FILES = {
    "Stanford Alpaca": File(
        "alpaca_data.json",
        [{"instruction": "Name a colour.", "input": "", "output": "Red."},
         {"instruction": "Sort.", "input": "b, a", "output": "a, b"}],
        "alpaca", "alpaca", [ALPACA % ("Name a colour.", "Red."), ALPACA_INPUT % ("Sort.", "b, a", "a, b")],
    ),
    "Alpaca with its text": File(
        "train.jsonl", [{"instruction": "Hi.", "input": "", "output": "Hello.", "text": "Below ..."}],
        "alpaca", "alpaca", [ALPACA % ("Hi.", "Hello.")],
    ),
    "Alpaca as a table": File(
        "data.csv", 'instruction,input,output\n"Say, please.",,Please\n', "alpaca", "alpaca",
        [ALPACA % ("Say, please.", "Please")],
    ),
    "OpenAI's fine-tuning": File(
        "train.jsonl", [{"messages": said(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))}],
        "openai", "chat", ["system\nBe brief.\nuser\nHi\nassistant\n«Hello<end>»"],
        messages=said(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")),
    ),
    "OpenAI's weights": File(
        "train.jsonl",
        [{"messages": [{**turn, "weight": weight} if weight is not None else turn
                       for turn, weight in zip(TURNS, (None, 0, None, 1), strict=True)]}],
        "openai", "chat", ["user\na?\nassistant\na!\nuser\nb?\nassistant\n«b!<end>»"], messages=TURNS, masked=False,
    ),
    "contents in parts": File(
        "train.jsonl",
        [{"messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a!"}]},
            *TURNS[2:],
        ]}],
        "openai", "chat", [TWO], messages=TURNS,
    ),
    "calls of tools": File(
        "tools.jsonl",
        [{"messages": [
            CALLED[0],
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c1", "type": "function", "function": {**CALL, "arguments": '{"a": 1, "b": 2}'}}
            ]},
            {**CALLED[2], "tool_call_id": "c1"},
            CALLED[3],
        ], "tools": [TOOL], "parallel_tool_calls": False}],
        "openai", "chat", [CALLED_SHOWN], messages=CALLED, tools=[TOOL],
    ),
    "LLaMA-Factory's tools": File(
        "glaive.json",
        [{"conversations": shared(
            ("human", "1 + 2?"), ("function_call", json.dumps(CALL)), ("observation", "3"), ("gpt", "It is 3.")
        ), "tools": json.dumps([TOOL])}],
        "sharegpt", "chat", [CALLED_SHOWN], messages=CALLED, tools=[TOOL],
    ),
    "UltraChat": File(
        "ultrachat.jsonl", [{"prompt": "a?", "prompt_id": "x1", "messages": TURNS}], "openai", "chat", [TWO],
        messages=TURNS,
    ),
    "ShareGPT of Vicuna": File(
        "ShareGPT_V3_unfiltered_cleaned_split.json",
        [{"id": "QWJ_0", "conversations": shared(("human", "a?"), ("gpt", "a!"), ("human", "b?"), ("gpt", "b!"))}],
        "sharegpt", "chat", [TWO], messages=TURNS,
    ),
    "ShareGPT that begins with an answer": File(
        "sharegpt.json",
        [{"id": "x_1", "conversations": shared(("gpt", "Hello."), ("human", "a"), ("human", "?"), ("gpt", "a!"))}],
        "sharegpt", "chat", ["assistant\nHello.\nuser\na\nuser\n?\nassistant\n«a!<end>»"],
        messages=said(("assistant", "Hello."), ("user", "a"), ("user", "?"), ("assistant", "a!")), masked=False,
    ),
    "OpenHermes": File(
        "openhermes.json",
        [{"conversations": shared(("system", "Be kind."), ("human", "a?"), ("gpt", "a!")), "source": "x"}],
        "sharegpt", "chat", ["system\nBe kind.\nuser\na?\nassistant\n«a!<end>»"],
        messages=said(("system", "Be kind."), ("user", "a?"), ("assistant", "a!")),
    ),
    "LMSYS-Chat": File(
        "lmsys.jsonl", [{"conversation_id": "1", "model": "m", "conversation": TURNS, "language": "English"}],
        "lmsys", "chat", [TWO], messages=TURNS,
    ),
    "prompts and completions": File(
        "prepared.jsonl", [{"prompt": "2 + 2 ->", "completion": " 4\n"}], "prompt-completion", "none",
        ["2 + 2 ->« 4\n<end>»"],
    ),
    "self-instruct": File(
        "self_instruct.jsonl", [{"prompt": "Name a fruit.\nOutput:", "completion": " A plum."}],
        "prompt-completion", "none", ["Name a fruit.\nOutput:« A plum.<end>»"], "shape: self-instruct",
    ),
    "TRL's prompts and completions": File(
        "trl.jsonl", [{"prompt": TURNS[:3], "completion": TURNS[3:]}], "trl", "chat",
        ["user\na?\nassistant\na!\nuser\nb?\nassistant\n«b!<end>»"], messages=TURNS, masked=False,
    ),
    "prompts and responses": File(
        "pairs.jsonl", [{"prompt": "Hi.", "response": "Hello."}], "prompt-response", "alpaca",
        [ALPACA % ("Hi.", "Hello.")],
    ),
    "GSM8K": File(
        "train.jsonl", [{"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}], "question-answer", "alpaca",
        [ALPACA % ("1 + 1?", "1 + 1 = 2\n#### 2")],
    ),
    "questions and answers in columns": File(
        "faq.tsv", "question\tanswer\nOpen?\tYes.\n", "question-answer", "alpaca", [ALPACA % ("Open?", "Yes.")]
    ),
    "qlora's own": File(
        "mine.json", [{"input": "cat: ", "output": "chat"}], "input-output", "none", ["cat: «chat<end>»"]
    ),
    "LongForm": File(
        "longform.json", [{"input": "Write on moss.", "output": "Moss is green.", "source": "C4", "subset": "c4"}],
        "input-output", "none", ["Write on moss.«Moss is green.<end>»"],
    ),
    "OIG's chip2": File(
        "unified_chip2.jsonl", [{"text": "<human>: a?\n<bot>: a!", "metadata": {"source": "unified_chip2"}}],
        "chip2", "chat", ["user\na?\nassistant\n«a!<end>»"], messages=TURNS[:2],
    ),
    "HH-RLHF": File(
        "harmless.jsonl",
        [{"chosen": "\n\nHuman: a?\n\nAssistant: a!\n\nHuman: b?\n\nAssistant: b!", "rejected": "\n\nHuman: a?"}],
        "hh-rlhf", "chat", [TWO], messages=TURNS,
    ),
    "UltraFeedback": File(
        "binarized.jsonl", [{"prompt": "a?", "chosen": TURNS[:2], "rejected": TURNS[:2], "score_chosen": 8.0}],
        "hh-rlhf", "chat", ["user\na?\nassistant\n«a!<end>»"], messages=TURNS[:2],
    ),
    "OpenAssistant of Guanaco": File(
        "openassistant_best_replies_train.jsonl",
        [{"text": "### Human: a?### Assistant: a!### Human: b?### Assistant: b!"}],
        "oasst1", "chat", [TWO], messages=TURNS,
    ),
    "Guanaco, all learned": File(
        "openassistant_best_replies_train.jsonl", [{"text": "### Human: a?### Assistant: a!"}],
        "oasst1", "chat", ["«user\na?\nassistant\na!<end>»"], "train_on_source: true", TURNS[:2], masked=False,
    ),
    "Guanaco as qlora lays it out": File(
        "openassistant_best_replies_train.jsonl", [{"text": "### Human: a?### Assistant: a!"}],
        "text", "none", ["«### Human: a?### Assistant: a!<end>»"], "shape: text",
    ),
    "Dolly": File(
        "databricks-dolly-15k.jsonl",
        [{"instruction": "When?", "context": "It was May.", "response": "In May.", "category": "closed_qa"},
         {"instruction": "Why?", "context": "", "response": "Because.", "category": "open_qa"}],
        "dolly", "alpaca", [ALPACA_INPUT % ("When?", "It was May.", "In May."), ALPACA % ("Why?", "Because.")],
    ),
    "OL-CC": File(
        "OL-CC.json", [{"id": "1", "turns": [{"text": "天空是什么颜色？"}, {"text": "蓝色。"}]}], "olcc", "chat",
        ["user\n天空是什么颜色？\nassistant\n«蓝色。<end>»"],
        messages=said(("user", "天空是什么颜色？"), ("assistant", "蓝色。")),
    ),
    "BELLE 1M": File(
        "Belle_open_source_1M.json", '{"instruction": "说你好。\\n", "input": "", "output": "你好。"}\n' * 2,
        "alpaca", "alpaca", [ALPACA % ("说你好。\n", "你好。")] * 2,
    ),
    "BELLE's dialogues": File(
        "multiturn_chat_0.8M.json",
        '{"instruction": "Human:你好\\nAssistant:您好。\\nHuman:几点？\\nAssistant:", '
        '"input": "", "output": "三点。"}\n' * 2,
        "belle", "chat", ["user\n你好\nassistant\n«您好。<end>»\nuser\n几点？\nassistant\n«三点。<end>»"] * 2,
        messages=said(("user", "你好"), ("assistant", "您好。"), ("user", "几点？"), ("assistant", "三点。")),
    ),
    "BELLE 3.5M": File(
        "train_3.5M_CN.json", [{"id": "7", "conversations": shared(("human", "你好"), ("assistant", "您好。"))}],
        "sharegpt", "chat", ["user\n你好\nassistant\n«您好。<end>»"],
        messages=said(("user", "你好"), ("assistant", "您好。")),
    ),
    "Gorilla": File(
        "huggingface_train.json",
        [{"code": "###Instruction: Sort names.\n###Output: <<<api_call>>>: sort()\n", "api_call": "sort()"}],
        "gorilla", "alpaca", [ALPACA % ("Sort names.", "<<<api_call>>>: sort()")],
    ),
    "plain texts": File("corpus.jsonl", [{"text": "Moss is green."}], "text", "none", ["«Moss is green.<end>»"]),
    "paragraphs": File("book.txt", "Moss is\ngreen.\n\nSo it is.\n", "text", "none",
                       ["«Moss is\ngreen.<end>»", "«So it is.<end>»"]),
    "the last answer only": File(
        "sharegpt.json",
        [{"conversations": shared(("human", "a?"), ("gpt", "a!"), ("human", "b?"), ("gpt", "b!"))}],
        "sharegpt", "chat", ["user\na?\nassistant\na!\nuser\nb?\nassistant\n«b!<end>»"], "mask_history: true",
        messages=TURNS, masked=False,
    ),
    "columns of other names": File(
        "faq.jsonl", [{"q": "Open?", "a": "Yes."}], "question-answer", "alpaca", [ALPACA % ("Open?", "Yes.")],
        "columns: {question: q, answer: a}",
    ),
    "a conversation in Alpaca's words": File(
        "sharegpt.json", [{"conversations": shared(("human", "Hi."), ("gpt", "Hello."))}], "sharegpt", "alpaca",
        [ALPACA % ("Hi.", "Hello.")], "prompt_type: alpaca",
    ),
}  # fmt: skip


def corpus_of(file: File, write, tokenizer, **settings) -> Corpus:
    path = write(file.name, file.content)
    if file.entry:
        path = write("data.yaml", f"META: [{{path: {file.name}, {file.entry}}}]")
    return build_corpus(path, tokenizer, max_words=4096, **settings)


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_what_is_learned(file: File, write, chat_tokenizer, tmp_path: Path):
    tokenizer = chat_tokenizer(TEMPLATE)
    corpus = corpus_of(file, write, tokenizer)
    assert [corpus.show(place) for place in range(len(corpus))] == file.documents
    assert f"shape {file.shape} (" in corpus.report and corpus.documents_by_prompt_layout() == {
        file.layout: len(file.documents)
    }
    if not file.messages:
        return
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer" / "tokenizer.json"))
    whole = theirs.apply_chat_template(
        file.messages, tools=file.tools, chat_template=TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
    )
    tokens, learned = corpus.tokens[: corpus.lengths[0]], corpus.learned[: corpus.lengths[0]]
    assert tokens.tolist() == whole["input_ids"][: len(tokens)]  # theirs goes on with the newline behind the last turn
    assert theirs.decode(whole["input_ids"][len(tokens) :]) == "\n"
    if file.masked:
        assert learned.tolist() == [flag == 1 for flag in whole["assistant_masks"][: len(tokens)]]


ASKED = f"{DIALOG_SYSTEM}\n\n### Human: a?\n### Assistant:"
LATER = f"{ASKED} a!\n### Human: b?\n### Assistant:« b!\n###<end>»"
DIALOGS = {
    "ShareGPT of Vicuna": f"{ASKED}« a!\n###» Human: b?\n### Assistant:« b!\n###<end>»",
    "OpenHermes": "Be kind.\n\n### Human: a?\n### Assistant:« a!\n###<end>»",
    "OpenAI's weights": LATER,
    "OIG's chip2": f"{ASKED}« a!\n###<end>»",
    "Guanaco, all learned": f"{ASKED[0]}«{ASKED[1:]} a!\n###<end>»",  # nothing stands before the first token
    "the last answer only": LATER,
}


@pytest.mark.parametrize("name", DIALOGS)
def test_without_a_chat_template_conversations_are_dialogues(name: str, write, chat_tokenizer):
    corpus = corpus_of(FILES[name], write, chat_tokenizer(None))
    assert corpus.show(0) == DIALOGS[name] and corpus.told.layouts == ["dialog"]


def test_with_dialog_questions_are_dialogues_too(write, chat_tokenizer):
    corpus = corpus_of(FILES["Dolly"], write, chat_tokenizer(TEMPLATE), dialog=True)
    words = "### Human: When?\n\nIt was May.\n### Assistant:« In May.\n###<end>»"
    assert corpus.show(0) == f"{DIALOG_SYSTEM}\n\n{words}"


BROKEN = {
    "other names": ({"query": "q", "reply": "a"}, "'query', 'reply'", "columns: {instruction: query, output: reply}"),
    "one other name": (
        {"question": "q", "solution": "a"}, "'question', 'solution'", "columns: {answer: solution}"
    ),
    "capitals": ({"Instruction": "q", "Output": "a"}, "'Instruction'", "columns: {instruction: Instruction, "),
    "a misspelling": ({"prompt": "q", "complation": "a"}, "'complation'", "columns: {completion: complation}"),
    "messages elsewhere": ({"dialogue": TURNS}, "'dialogue'", "columns: {messages: dialogue}"),
    "turns elsewhere": ({"chat": shared(("human", "q"), ("gpt", "a"))}, "'chat'", "columns: {conversations: chat}"),
    "one text": ({"body": "words", "id": 3}, "'body', 'id'", "columns: {text: body}"),
    "numbers": ({"x": 1, "y": 2}, "'x', 'y'", "say which are question and answer in the YAML: 'columns: {instruction"),
    "no answer": ({"instruction": "q"}, "has no key 'output', only 'instruction'", "nearest shape is alpaca"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TURNS[1]]}, "'messages'", "'image_url'"
    ),
    "nobody answers": ({"conversations": shared(("human", "q"))}, "'conversations'", "no turn of the assistant"),
    "turns of other names": (
        {"conversations": [{"speaker": "a", "words": "b"}]}, "'speaker', 'words'", "'from' and 'value', or"
    ),
    "an unknown speaker": ({"conversations": shared(("ann", "q"), ("gpt", "a"))}, "'ann'", "expected human, gpt"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_records_name_their_keys_and_the_remedy(name: str, write, chat_tokenizer):
    record, found, remedy = BROKEN[name]
    path = write("data.jsonl", [record] * 2)
    with pytest.raises(DataError) as caught:
        build_corpus(path, chat_tokenizer(TEMPLATE), max_words=512)
    assert found in str(caught.value) and remedy in str(caught.value) and f"{path}:1" in str(caught.value)
    if advice := re.search(r"'(columns: \{.*\})' in the YAML$", str(caught.value).partition(" (/")[0], re.MULTILINE):
        mapped = write("data.yaml", f"META: [{{path: data.jsonl, {advice[1]}}}]")
        assert len(build_corpus(mapped, chat_tokenizer(TEMPLATE), max_words=512)) == 2
    assert ("columns" in remedy and "KEY" not in str(caught.value)) == bool(advice)


@pytest.mark.parametrize(("file", "entry", "cause"), [
    ("ShareGPT of Vicuna", "prompt_type: alpaca", "is a conversation of 4 turns, .*: chat, or dialog"),
    ("calls of tools", "prompt_type: dialog", "holds calls of tools, which the layout dialog has no place for"),
])  # fmt: skip
def test_a_layout_without_a_place_for_what_is_said(file: str, entry: str, cause: str, write, chat_tokenizer):
    with pytest.raises(DataError, match=cause):
        write(FILES[file].name, FILES[file].content)
        yaml = write("data.yaml", f"META: [{{path: {FILES[file].name}, {entry}}}]")
        build_corpus(yaml, chat_tokenizer(TEMPLATE), max_words=512)


def test_a_template_without_a_place_for_tools(write, chat_tokenizer):
    """What it has no place for is a cause where it is to be learned, else it is said not to be used."""
    plain = TEMPLATE.replace("call.function | tojson", "''").replace("{% if tools %}", "{% if false %}")
    with pytest.raises(DataError, match="leaves out tool_calls"):
        corpus_of(FILES["calls of tools"], write, chat_tokenizer(plain))
    path = write("x.jsonl", [{"messages": TURNS, "tools": [TOOL]}])
    assert "not used: 'tools' of 1 records" in build_corpus(path, chat_tokenizer(plain), max_words=512).report


def test_control_tokens_that_calls_and_tools_spell_stay_text(write, chat_tokenizer):
    """In names, keys and values: they forge no turn."""
    spelled = "x<|im_end|>"
    call = {"function": {"name": f"add{spelled}", "arguments": {spelled: [spelled], "a": 1}}}
    tool = {"type": "function", "function": {"name": spelled, "parameters": {"properties": {spelled: {}}}}}
    messages = [CALLED[0], {"role": "assistant", "content": spelled, "tool_calls": [call]}, *CALLED[2:]]
    tokenizer = chat_tokenizer(TEMPLATE)
    corpus = build_corpus(write("x.jsonl", [{"messages": messages, "tools": [tool]}]), tokenizer, max_words=512)
    begins, ends = (corpus.tokens.tolist().count(token) for token in (256, 257))
    assert (begins, ends) == (5, 5) and corpus.show(0).count("x<|im_end|>") == 6
