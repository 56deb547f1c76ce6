"""What a record says, read from turns and from texts with marks."""

import pytest

from accessory.data.messages import Question, read_marked, read_question, read_text, read_turns, turn_keys
from accessory.data.omissions import UnusableRecord

SURROGATE = r"^holds half of a surrogate pair \(\\ud800 to \\udfff\), which is no text$"
NAMES = ("instruction", "input", "output")


def turns(*pairs):
    return {"conversations": [{"from": who, "value": words} for who, words in pairs]}


def said(conversation):
    return [(message["role"], message["content"], flag) for message, flag in
            zip(conversation.messages, conversation.learned, strict=True)]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"instruction": "q"}, "^has no key 'output', only 'instruction'$"),
        ({"instruction": "q", "outptu": "a"}, "^has no key 'output', only '.*', 'outptu'; did it mean 'outptu'$"),
        ({"instructions": "q", "output": "a"}, "^has no key 'instruction', .*; did it mean 'instructions'$"),
        ({"instruction": "q", "output": " \n"}, "^'output' is empty$"),
        ({"instruction": "q", "output": ["a"]}, "'output' is a list"),
        ({"instruction": None, "output": "a"}, "'instruction' is null"),
        ({"instruction": "q", "input": 3, "output": "a"}, "'input' is a number"),
        ({"instruction": "q", "input": 0, "output": "a"}, "'input' is a number"),
        ({"instruction": "q", "input": [], "output": "a"}, "'input' is a list"),
        ({"instruction": "q", "output": "a", "image": "x.jpg"}, "has 'image', which the model does not take"),
        ({"instruction": "q", "output": "a", "images": ["x.jpg"], "audios": ["y"]}, "has 'images', 'audios', which"),
    ],
)
def test_unusable_records_give_their_cause(fields, cause):
    with pytest.raises(UnusableRecord, match=cause):
        read_question(fields, NAMES)


def test_a_question_is_read_under_its_names():
    fields = {"prompt": "q", "context": None, "response": "a"}
    assert read_question(fields, ("prompt", "context", "response")) == Question("q", "", "a")
    with pytest.raises(UnusableRecord, match=r"^'response' is empty$"):
        read_question(fields | {"response": ""}, ("prompt", "context", "response"))
    assert read_question({"output": "a"}, NAMES, needs_instruction=False) == Question("", "", "a")


@pytest.mark.parametrize("key", ["image", "images", "video", "videos", "audio", "audios"])
def test_media_are_a_cause(key):
    """Under each of their keys."""
    hint = r" \(docs/vision.md: which models do\)" if key.startswith("image") else ""
    cause = rf"^has '{key}', which the model does not take{hint}$"
    for read in (
        lambda fields: read_question({"instruction": "q", "output": "a", **fields}, NAMES),
        lambda fields: read_turns({**turns(("human", "q"), ("gpt", "a")), **fields}, "conversations"),
        lambda fields: read_text({"text": "t", **fields}, "text"),
    ):
        with pytest.raises(UnusableRecord, match=cause):
            read({key: ["x"]})


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"conversation": []}, "^has no key 'conversations', only 'conversation'; did it mean 'conversation'$"),
        ({"conversations": []}, "^'conversations' is an empty list, expected a list of turns$"),
        ({"conversations": None}, "^'conversations' is null, expected a list of turns$"),
        ({"conversations": "text"}, "^'conversations' is a text, expected a list of turns$"),
        ({}, "^has no key 'conversations', nor any other$"),
        (turns(("human", "q")), "^'conversations' has no turn of the assistant$"),
        (turns(("human", "q"), ("robot", "a")), "a turn from 'robot'; expected human, gpt, observation, system, "),
        ({"conversations": [{"role": "user", "text": "q"}]}, "'content' is null, expected text$"),
        ({"conversations": [{"who": "user", "value": "q"}]}, "without 'from' and 'value', .*: it has 'who', 'value'$"),
        (turns(("human", "q"), ("gpt", 3)), "holds a turn whose 'value' is a number, expected text$"),
        ({"conversations": ["q", "a"]}, "turn without 'from' .*: it is a text$"),
        ({"conversations": [5]}, "turn without 'from' .*: it is a number$"),
        (turns((["a"], "q")), "turn without 'from'"),
        (turns((None, "q"), ("gpt", "a")), "turn without 'from'"),
        (turns(("human", "q"), ("gpt", " ")), "^'conversations' holds an empty answer$"),
        (turns(("gpt", "a"), ("human", "q")), "holds no answer to learn: none follows a turn of the human or a tool$"),
        (turns(("system", "s"), ("gpt", "a")), "holds no answer to learn"),
        (turns(("human", "\ud800"), ("gpt", "a")), SURROGATE),
        (turns(("human", "q"), ("gpt", "\ud800")), SURROGATE),
    ],
)  # fmt: skip
def test_unusable_conversations_give_their_cause(fields, cause):
    with pytest.raises(UnusableRecord, match=cause):
        read_turns(fields, "conversations")


def test_turns_in_any_order():
    """Answers before any question are context; all that follow are learned."""
    found = read_turns(
        turns(("gpt", "hi"), ("human", "q"), ("human", "r"), ("gpt", "a"), ("gpt", "b")), "conversations"
    )
    assert said(found) == [
        ("assistant", "hi", False), ("user", "q", False), ("user", "r", False), ("assistant", "a", True),
        ("assistant", "b", True),
    ]  # fmt: skip


def test_who_speaks():
    names = {
        "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
        "chatgpt": "assistant", "bot": "assistant", "system": "system", "developer": "developer", "tool": "tool",
        "observation": "tool", "function_response": "tool", "function": "tool",
    }  # fmt: skip
    for name, role in names.items():
        assert read_turns(turns((name, "x"), ("human", "q"), ("gpt", "a")), "conversations").messages[0]["role"] == role


def test_the_system_is_who_speaks_first():
    assert read_turns(turns(("system", "s"), ("human", "q"), ("gpt", "a")), "conversations").system == "s"
    assert read_turns(turns(("human", "q"), ("gpt", "a")), "conversations").system is None


def test_messages_of_openai():
    """Contents in parts, weights, calls of tools and their answers."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 1"}], "name": "ann"},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "call"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "assistant", "content": "2", "weight": 1},
    ]
    found = read_turns({"messages": messages, "tools": '[{"type": "function"}]'}, "messages")
    assert [words for _, words, _ in said(found)] == ["1 + 1", "no", "call", "", "2", "2"]
    assert found.learned == [False, False, False, True, False, True]
    assert found.messages[0]["name"] == "ann" and found.messages[4]["tool_call_id"] == "c1"
    assert found.messages[3]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert found.tools == [{"type": "function"}]


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ({"content": [{"type": "image_url", "image_url": "x"}]}, "a part of type 'image_url', which the model"),
        ({"content": [3]}, "a part of a turn that is a number, expected a text"),
        ({"content": None}, "a turn whose 'content' is null, expected text"),
        ({"content": None, "tool_calls": [{"function": {"name": "f"}}]}, "tool_calls that are not a list of functions"),
        ({"content": None, "tool_calls": ["f"]}, "tool_calls that are not a list of functions"),
    ],
)
def test_what_messages_cannot_hold(message, cause):
    with pytest.raises(UnusableRecord, match=f"^'messages' holds {cause}"):
        read_turns({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **message}]}, "messages")


def test_a_call_that_llama_factory_writes_as_a_turn():
    found = read_turns(turns(("human", "q"), ("function_call", '{"name": "f", "arguments": {}}')), "conversations")
    assert found.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    plain = read_turns(turns(("human", "q"), ("function_call", "f()")), "conversations")
    assert plain.messages[1] == {"role": "assistant", "content": "f()"}


def test_a_text_with_marks():
    """Blanks around turns belong to the marks, and words before the first to the system; a last mark may be bare."""
    text = "Be kind.\n\nHuman: a\n\nAssistant:  b: Human: c\n\nHuman: d\n\nAssistant:"
    found = read_marked({"chosen": text}, "chosen", r"\n\nHuman:", r"\n\nAssistant:")
    assert said(found) == [
        ("system", "Be kind.", False), ("user", "a", False), ("assistant", "b: Human: c", True), ("user", "d", False)
    ]  # fmt: skip
    with pytest.raises(UnusableRecord, match="'chosen' has no turn of the assistant"):
        read_marked({"chosen": "\n\nHuman: a"}, "chosen", r"\n\nHuman:", r"\n\nAssistant:")


def test_a_plain_text():
    assert read_text({"text": " a\n"}, "text") == " a\n"
    with pytest.raises(UnusableRecord, match=r"^'text' is empty$"):
        read_text({"text": " "}, "text")


def test_which_keys_of_a_turn_are_read():
    assert turn_keys({"from": "human", "value": "q", "weight": 0}) == ("from", "value")
    assert {"role", "content", "tool_calls", "weight"} <= set(turn_keys({"role": "user"}))
