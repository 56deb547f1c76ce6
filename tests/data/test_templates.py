import pytest

from accessory.data.messages import Conversation, Question, read_turns
from accessory.data.omissions import UnusableRecord
from accessory.data.shapes import SHAPES
from accessory.data.templates import (
    DIALOG,
    DIALOG_SYSTEM,
    PROMPT_LAYOUTS,
    documents_of,
    each_question,
    format_prompt,
    layout_of,
    question_messages,
    question_prompt,
    unused_keys,
)
from accessory.errors import ConfigError


def turns(*pairs):
    return {"conversations": [{"from": who, "value": words} for who, words in pairs]}


def conversation(*pairs):
    return read_turns(turns(*pairs), "conversations")


def only(said, layout, **how):
    (segments,) = documents_of(said, layout, **how)
    return segments


def text(segments, supervised=None):
    return "".join(s.text for s in segments if supervised is None or s.supervised is supervised)


def test_alpaca_is_the_published_wording():
    assert format_prompt("Add {x}.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {x}.\n\n### Response:"
    )
    assert format_prompt("Add.", "1 {instruction}", "alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 {instruction}"
        "\n\n### Response:"
    )


def test_the_words_of_a_template_inside_a_text_are_text():
    assert "### Instruction:\nFill {input}.\n\n### Input:\n{instruction}\n" in format_prompt(
        "Fill {input}.", "{instruction}"
    )


def test_the_other_templates():
    assert format_prompt("q", "", "none") == "q"
    assert format_prompt("q", "", "caption") == ""
    assert format_prompt("q", "", "shortqa") == "q\nAnswer the question using a single word or phrase."
    assert format_prompt("q", "", "qg") == "Generate a question whose answer is: q"


def test_an_unknown_template_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'alpacca' is unknown\. Did you mean 'alpaca'\? Known: alpaca, .*, none\.$"):
        format_prompt("q", "", "alpacca")


@pytest.mark.parametrize("context", ["", "numbers"])
def test_only_the_answer_is_learned(context):
    segments = only(Question("q", context, "a"), "alpaca")
    assert text(segments, False) == format_prompt("q", context) and text(segments, True) == "a"


def test_a_caption_needs_no_instruction():
    assert text(only(Question("", "", "a"), "caption")) == "a"


def test_plain_text_is_learned_as_it_stands():
    assert [(s.text, s.supervised) for s in only("some words", "none")] == [("some words", True)]
    with pytest.raises(UnusableRecord, match="is plain text, which is no conversation"):
        documents_of("some words", DIALOG)


def test_unused_keys():
    """They depend on what the template reads; keys with empty values do not count."""
    rest = {"system": "s", "id": 3, "empty": "", "null": None, "list": [], "map": {}}
    fields = {"instruction": "q", "input": "c", "output": "a", **rest}
    for layout, read in (("alpaca", 2), ("chat", 2), ("shortqa", 1), ("caption", 0)):
        found = unused_keys(fields, SHAPES["alpaca"], layout)
        assert found == ["'instruction'", "'input'", "'system'", "'id'"][read:], layout
    dolly = {"instruction": "q", "context": "c", "response": "a", "category": "open_qa"}
    assert unused_keys(dolly, SHAPES["dolly"], "alpaca") == ["'category'"]
    assert unused_keys(dolly, SHAPES["dolly"], "none") == ["'context'", "'category'"]
    said = turns(("human", "q"), ("gpt", "a"), ("human", "q2"))
    said["conversations"][0] |= {"weight": 1, "mood": "", "date": "today"}
    inner = ["'date' in conversations", "'weight' in conversations"]
    sharegpt = SHAPES["sharegpt"]
    assert unused_keys({**said, **rest}, sharegpt, DIALOG) == ["'system'", "'id'", *inner]
    assert unused_keys({**said, "tools": "[1]"}, sharegpt, "chat") == ["'tools'", *inner]
    assert unused_keys({**said, "tools": "[1]"}, sharegpt, "chat", tools=True) == inner
    assert not unused_keys(turns(("human", "q"), ("gpt", "a")), sharegpt, "none")


def test_a_question_stands_as_it_stood_in_training():
    assert PROMPT_LAYOUTS == ("alpaca", "shortqa", "qg", "caption", "none", "chat", "dialog")
    for layout in PROMPT_LAYOUTS[:5]:
        assert question_prompt("q", "c", layout) == format_prompt("q", "c", layout)
    assert question_prompt("q", "c", "chat") == question_messages("q", "c")
    system = {"role": "system", "content": "s"}
    assert question_prompt("q", "c", "chat", "s") == [system, *question_messages("q", "c")]
    assert question_prompt("q", "", DIALOG, "s").pieces[0] == "s\n"


def test_llava_takes_each_question_with_its_answer():
    said = conversation(("human", "q"), ("gpt", "a"), ("human", "q2"), ("gpt", "a2"), ("human", "q3"))
    assert each_question(said) == [Question("q", "", "a"), Question("q2", "", "a2")]
    with pytest.raises(UnusableRecord, match=r"^does not go from human to assistant and back, the human first$"):
        each_question(conversation(("human", "q"), ("human", "q2"), ("gpt", "a")))


def test_dialog_layout_and_what_is_learned_of_it():
    segments = only(conversation(("human", "q1"), ("gpt", "a1"), ("user", "q2"), ("assistant", "a2")), DIALOG)
    assert text(segments) == (
        f"{DIALOG_SYSTEM}\n\n### Human: q1\n### Assistant: a1\n### Human: q2\n### Assistant: a2\n###"
    )
    assert [s.text for s in segments if s.supervised] == [" a1\n###", " a2\n###"]
    assert DIALOG_SYSTEM == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions."
    )


def test_the_systems_words_stand_in_place_of_the_layouts_own():
    said = conversation(("system", "Be brief."), ("gpt", "hi"), ("human", "q"), ("gpt", "a"))
    segments = only(said, DIALOG)
    assert text(segments) == "Be brief.\n\n### Assistant: hi\n### Human: q\n### Assistant: a\n###"
    assert [s.text for s in segments if s.supervised] == [" a\n###"]


def test_only_the_last_answer_is_learned_where_the_history_is_masked():
    pairs = [("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "b"), ("human", "bye")]
    segments, whole = (only(conversation(*pairs), DIALOG, last_only=last) for last in (True, False))
    assert [s.text for s in segments if s.supervised] == [" b\n###"] and text(segments) == text(whole)


def test_words_of_a_dialog_stand_as_they_are():
    """The indentation at the start of code, above all; without an image `<image>` is a word."""
    question, answer = "  def f():\n", "    return '<image>'\n"
    segments = only(conversation(("human", question), ("gpt", answer)), DIALOG)
    assert [s.text for s in segments if s.supervised] == [f" {answer}\n###"]
    assert f"### Human: {question}\n###" in text(segments)
    assert "".join(question_prompt(question, "", DIALOG).pieces) == text(segments[:-1])


def test_a_question_of_a_dialog_has_its_input_below_it():
    assert any("a\n\nb" in piece for piece in question_prompt("a", "b", DIALOG).pieces)
    assert text(only(Question("a", "b", "c"), DIALOG)).endswith("### Human: a\n\nb\n### Assistant: c\n###")


@pytest.mark.parametrize("role", ["tool", "developer", "system"])
def test_what_the_dialog_layout_has_no_place_for(role):
    said = conversation(("human", "q"), (role, "x"), ("gpt", "a"))
    with pytest.raises(
        UnusableRecord, match=f"^holds a turn of the role '{role}', which .* prompt_type: chat takes it$"
    ):
        documents_of(said, DIALOG)
    calls = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [1]}]
    with pytest.raises(UnusableRecord, match=r"^holds calls of tools, which"):
        documents_of(Conversation(calls, [False, True]), DIALOG)


def test_a_conversation_where_one_question_is_asked_for():
    assert text(only(conversation(("human", "q"), ("gpt", "a")), "none")) == "qa"
    with pytest.raises(UnusableRecord, match=r"^is a conversation of 3 turns, and prompt_type alpaca lays out one"):
        documents_of(conversation(("system", "s"), ("human", "q"), ("gpt", "a")), "alpaca")


def test_which_layout_a_shape_gets():
    for shape, plain, with_template in (
        ("alpaca", "alpaca", "alpaca"), ("dolly", "alpaca", "alpaca"), ("input-output", "none", "none"),
        ("sharegpt", "dialog", "chat"), ("openai", "dialog", "chat"), ("text", "none", "none"),
    ):  # fmt: skip
        found = [layout_of(SHAPES[shape], None, False, template) for template in (False, True)]
        assert found == [plain, with_template], shape
    assert layout_of(SHAPES["alpaca"], None, True, True) == "dialog"
    assert layout_of(SHAPES["sharegpt"], "chat", True, True) == "chat"
    assert layout_of(SHAPES["sharegpt"], "none", True, True) == "dialog"
    assert layout_of(SHAPES["sharegpt"], "none", False, True) == "none"
    assert layout_of(SHAPES["text"], "chat", True, True) == "none"
