import pytest

from accessory.data.templates import (
    DIALOG,
    DIALOG_SYSTEM,
    PROMPT_LAYOUTS,
    UnusableRecord,
    conversation,
    conversation_messages,
    format_prompt,
    question_messages,
    question_prompt,
    single_turn,
    single_turn_llava,
    single_turn_messages,
    unused_keys,
)
from accessory.errors import ConfigError

SURROGATE = r"^holds half of a surrogate pair \(\\ud800 to \\udfff\), which is no text$"
ORDER = r"^'conversations' does not go from human to assistant and back, the human first$"


def turns(*pairs):
    return {"conversations": [{"from": who, "value": words} for who, words in pairs]}


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


@pytest.mark.parametrize("context", [None, "", "numbers"])
def test_only_the_answer_is_learned(context):
    segments = single_turn({"instruction": "q", "input": context, "output": "a"}, "alpaca")
    assert text(segments, False) == format_prompt("q", context or "") and text(segments, True) == "a"


def test_a_caption_needs_no_instruction():
    assert text(single_turn({"output": "a"}, "caption")) == "a"


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"instruction": "q"}, "^has no 'output' among its keys 'instruction'$"),
        ({"instruction": "q", "outptu": "a"}, "^has no 'output' among its keys '.*', 'outptu'; did it mean 'outptu'$"),
        ({"instructions": "q", "output": "a"}, "no 'instruction'.*'instructions'"),
        ({"instruction": "q", "output": " \n"}, "'output' is empty"),
        ({"instruction": "q", "output": ["a"]}, "'output' is a list"),
        ({"instruction": None, "output": "a"}, "'instruction' is null"),
        ({"instruction": "q", "input": 3, "output": "a"}, "'input' is a number"),
        ({"instruction": "q", "input": 0, "output": "a"}, "'input' is a number"),
        ({"instruction": "q", "input": [], "output": "a"}, "'input' is a list"),
        (turns(("human", "q"), ("gpt", "a")), "'instruction' among its keys 'conversations'; .*with --dialog"),
        ({"instruction": "q", "output": "a", "image": "x.jpg"}, "has 'image', and there is no vision"),
        ({"instruction": "q", "output": "a", "images": ["x.jpg"], "audios": ["y"]}, "has 'images', 'audios', and"),
    ],
)
def test_unusable_records_give_their_cause(fields, cause):
    with pytest.raises(UnusableRecord, match=cause):
        single_turn(fields, "alpaca")


@pytest.mark.parametrize("key", ["image", "images", "video", "videos", "audio", "audios"])
def test_media_are_a_cause(key):
    """Under each of their keys."""
    cause = rf"^has '{key}', and there is no vision or audio part yet$"
    with pytest.raises(UnusableRecord, match=cause):
        single_turn({"instruction": "q", "output": "a", key: ["x"]}, "alpaca")
    with pytest.raises(UnusableRecord, match=cause):
        conversation({**turns(("human", "q"), ("gpt", "a")), key: ["x"]})


def test_unused_keys():
    """They depend on what the template reads; keys with empty values do not count."""
    rest = {"system": "s", "id": 3, "empty": "", "null": None, "list": [], "map": {}}
    fields = {"instruction": "q", "input": "c", "output": "a", **rest}
    for prompt_type, read in (("alpaca", 2), ("chat", 2), ("shortqa", 1), ("caption", 0)):
        found = unused_keys(fields, prompt_type, dialog=False, llava=False)
        assert found == ["'instruction'", "'input'", "'system'", "'id'"][read:], prompt_type
    said = turns(("human", "q"), ("gpt", "a"), ("human", "q2"))
    said["conversations"][0] |= {"weight": 1, "mood": "", "date": "today"}
    inner = ["'date' in conversations", "'weight' in conversations"]
    assert unused_keys({**said, **rest}, "none", dialog=True, llava=False) == ["'system'", "'id'", *inner]
    beyond = "conversations after the first answer"
    assert unused_keys(said, "none", dialog=False, llava=True) == [*inner, beyond]
    assert not unused_keys(turns(("human", "q"), ("gpt", "a")), "none", dialog=False, llava=True)


def test_a_question_stands_as_it_stood_in_training():
    assert PROMPT_LAYOUTS == ("alpaca", "shortqa", "qg", "caption", "none", "chat", "dialog")
    for layout in PROMPT_LAYOUTS[:5]:
        assert question_prompt("q", "c", layout) == format_prompt("q", "c", layout)
    assert question_prompt("q", "c", "chat") == question_messages("q", "c")


def test_llava_takes_the_first_question_and_answer():
    fields = turns(("human", "q"), ("gpt", "a"), ("human", "q2"), ("gpt", "a2"))
    assert single_turn_llava(fields) == {"instruction": "q", "output": "a"}
    with pytest.raises(UnusableRecord, match=r"^has 'image', and there is no vision or audio part yet$"):
        single_turn_llava({**fields, "image": "x.jpg"})
    with pytest.raises(UnusableRecord, match=r"^'conversations' has fewer than two turns$"):
        single_turn_llava(turns(("human", "q")))


def test_dialog_layout_and_what_is_learned_of_it():
    segments = conversation(turns(("human", "q1"), ("gpt", "a1"), ("user", "q2"), ("assistant", "a2")))
    assert text(segments) == (
        f"{DIALOG_SYSTEM}\n\n### Human: q1\n### Assistant: a1\n### Human: q2\n### Assistant: a2\n###"
    )
    assert [s.text for s in segments if s.supervised] == [" a1\n###", " a2\n###"]
    assert DIALOG_SYSTEM == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions."
    )


def test_words_of_a_dialog_stand_as_they_are():
    """The indentation at the start of code, above all; without an image `<image>` is a word."""
    question, answer = "  def f():\n", "    return '<image>'\n"
    fields = turns(("human", question), ("gpt", answer))
    assert [s.text for s in conversation(fields) if s.supervised] == [f" {answer}\n###"]
    assert f"### Human: {question}\n###" in text(conversation(fields))
    assert [message["content"] for message in conversation_messages(fields)] == [question, answer]
    pieces = question_prompt(question, "", DIALOG).pieces
    assert "".join(pieces) == text(conversation(fields)[:-1])


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"conversation": []}, "no list 'conversations'.*'conversation'"),
        (turns(("human", "q")), "^'conversations' has no turn of the assistant$"),
        (turns(("human", "q"), ("robot", "a")), "a turn from 'robot'; expected human, user, gpt, assistant$"),
        (
            turns(("system", "s"), ("human", "q")),
            "a turn from 'system'; expected human, .*assistant; prompt_type: chat takes it$",
        ),
        ({"conversations": [{"role": "user", "content": "q"}]}, "without 'from' .*: it has 'role', 'content'"),
        ({"instruction": "q", "output": "a"}, "among its keys 'instruction', 'output'.* without --dialog"),
        (turns(("human", "q"), ("gpt", 3)), "and 'value'"),
        ({"conversations": ["q", "a"]}, "turn without 'from'"),
        ({**turns(("human", "q"), ("gpt", "a")), "image": "x"}, "has 'image'"),
        ({**turns(("human", "q"), ("gpt", "a")), "videos": ["x"]}, "has 'videos'"),
    ],
)
def test_unusable_conversations_give_their_cause(fields, cause):
    with pytest.raises(UnusableRecord, match=cause):
        conversation(fields)


@pytest.mark.parametrize(
    ("pairs", "cause"),
    [
        ([("gpt", "a"), ("human", "q")], ORDER),
        ([("human", "q"), ("gpt", "")], "^'conversations' holds an empty answer$"),
        ([("human", "q"), ("human", "q2"), ("gpt", "a")], ORDER),
    ],
)
def test_conversations_take_turns_and_answers_have_words(pairs, cause):
    with pytest.raises(UnusableRecord, match=cause):
        conversation(turns(*pairs))


def test_an_unpaired_surrogate_is_a_cause():
    """Wherever it stands."""
    for record in ({"instruction": "q", "output": "\ud800"}, {"instruction": "\ud800", "output": "a"}):
        with pytest.raises(UnusableRecord, match=SURROGATE):
            single_turn(record, "alpaca")
        with pytest.raises(UnusableRecord, match=SURROGATE):
            conversation(turns(("human", record["instruction"]), ("gpt", record["output"])))


@pytest.mark.parametrize("who", [[], {}, None, 3])
def test_a_speaker_that_is_no_text_is_a_cause(who):
    with pytest.raises(UnusableRecord, match="turn without 'from'"):
        single_turn_llava(turns((who, "q"), ("gpt", "a")))


@pytest.mark.parametrize("pairs", [[("gpt", "a"), ("human", "q")], [("human", "q"), ("gpt", " ")]])
def test_llava_never_learns_a_question_or_nothing(pairs):
    with pytest.raises(UnusableRecord):
        single_turn_llava(turns(*pairs))


def test_a_record_as_messages():
    fields = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assistant = {"role": "assistant", "content": "3"}
    assert single_turn_messages(fields) == [{"role": "user", "content": "Add.\n\n1 2"}, assistant]
    assert single_turn_messages({**fields, "input": ""}) == [{"role": "user", "content": "Add."}, assistant]
    assert question_messages("Add.", "1 2") == single_turn_messages(fields)[:1]


@pytest.mark.parametrize(
    "wrong", [{"instruction": 1}, {"output": ""}, {"image": "x"}, {"input": 1}, {"output": "\ud800"}]
)
def test_what_is_no_record_is_none_as_messages_either(wrong):
    with pytest.raises(UnusableRecord):
        single_turn_messages({"instruction": "q", "output": "a", **wrong})


def test_a_conversation_as_messages():
    assert conversation_messages(turns(("human", "q"), ("gpt", "a"))) == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    surrogate = turns(("human", "\ud800"), ("gpt", "a"))
    for wrong in (
        surrogate,
        turns(("human", "q")),
        turns(("gpt", "a")),
        {**turns(("human", "q"), ("gpt", "a")), "image": "x"},
    ):
        with pytest.raises(UnusableRecord):
            conversation_messages(wrong)


def test_speakers_as_roles():
    found = conversation_messages(
        turns(
            ("system", "s"), ("developer", "d"), ("human", "q"), ("gpt", "a"), ("observation", "o"), ("assistant", "b")
        )
    )
    assert [message["role"] for message in found] == ["system", "developer", "user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("pairs", "cause"),
    [
        (
            [("gpt", "a"), ("human", "q")],
            "^'conversations' holds an answer that follows no turn of the human or a tool$",
        ),
        ([("human", "q"), ("gpt", "a"), ("gpt", "b")], "follows no turn"),
        ([("system", "s"), ("gpt", "a")], "follows no turn"),
        ([("system", "s"), ("human", "q")], "no turn of the assistant"),
        ([("human", "q"), ("gpt", " ")], "empty answer"),
        ([("human", "q"), ("robot", "a")], "a turn from 'robot'; expected human, gpt, observation, system, .*tool$"),
    ],
)
def test_messages_that_nobody_answers_are_a_cause(pairs, cause):
    with pytest.raises(UnusableRecord, match=cause):
        conversation_messages(turns(*pairs))


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"conversations": "text"}, "'conversations' is a text, expected a list of turns"),
        ({}, "has no list 'conversations' among its keys (it has none)"),
        (
            {"conversations": [5]},
            "'conversations' holds a turn without 'from' (human, user, gpt, assistant) and 'value': it is a number",
        ),
    ],
)
def test_a_cause_says_all_and_no_more(fields, cause):
    with pytest.raises(UnusableRecord) as caught:
        conversation(fields)
    assert str(caught.value) == cause


def test_an_empty_answer_is_called_so():
    with pytest.raises(UnusableRecord) as caught:
        single_turn({"instruction": "a", "output": " "}, "alpaca")
    assert str(caught.value) == "'output' is empty"


def test_a_question_of_a_dialog_has_its_input_below_it():
    assert any("a\n\nb" in piece for piece in question_prompt("a", "b", "dialog").pieces)


def test_llava_is_content_with_one_question_and_answer():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert single_turn_llava({"conversations": turns})["output"] == "b"
