import pytest

from accessory.data.records import kind, shown_keys, some


@pytest.mark.parametrize(
    ("value", "said"),
    [({}, "an object"), ([], "a list"), ("", "a text"), (True, "a truth value"), (None, "null"), (1, "a number"),
     (0.5, "a number"), (b"", "bytes"), ((), "of the type tuple")],
)  # fmt: skip
def test_a_value_is_named_in_the_words_of_json(value, said):
    assert kind(value) == said


def test_only_the_first_keys_are_shown_each_cut():
    assert shown_keys(["a", "b" * 50]) == f"'a', '{'b' * 40}'"
    assert shown_keys(map(str, range(13))).endswith("'11', ...")


def test_of_many_names_the_first_are_told():
    assert some([1, "b"]) == "1, b" and some(range(11)) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"
