"""Conversations: answers equal those of the same turns from scratch, and what is kept is not computed again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from accessory import FinetuneConfig, finetune
from accessory.conversation import Conversation, Turn
from accessory.data.corpus import build_corpus
from accessory.data.templates import CHAT, DIALOG, DIALOG_SYSTEM, DialogPrompt
from accessory.errors import ConfigError, TokenizerError
from accessory.generate import generate_tokens
from accessory.meta import MetaModel, answers
from accessory.parallel import groups

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
SHORTENS = TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else m.content[:5] }}")
"""A template that rewrites earlier answers, as those do that drop reasoning."""
WITHOUT_END = TEMPLATE.replace("</s>", "").replace("<s>", "\n")
"""A template without control tokens, which ends no answer."""
WITHOUT_SYSTEM = TEMPLATE.replace("in messages", "in messages if m.role != 'system'")
QUESTIONS = ("What is QST?", "And the side network?", "Why?", "Thanks. How fast is it?", "Bye")


@pytest.fixture(scope="module", autouse=True)
def layout() -> Iterator[groups.Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()


@pytest.fixture(scope="module")
def load(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory):
    """Chat template, or none -> the tiny model in fp32."""

    def make(template: str | None = None, max_seq_len: int = 500) -> MetaModel:
        directory = tmp_path_factory.mktemp("tokenizer")
        (directory / "tokenizer.json").write_bytes((tiny_base / "tokenizer.json").read_bytes())
        config = json.loads((tiny_base / "tokenizer_config.json").read_text())
        (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        return MetaModel.from_pretrained(tiny_base, tokenizer_path=directory, dtype="fp32", max_seq_len=max_seq_len)

    return make


def last(texts: Iterator[str]) -> str:
    """The whole answer; checks that it only grew."""
    shown = ""
    for text in texts:
        assert text.startswith(shown)
        shown = text
    return shown


def tokens_from_scratch(model: MetaModel, ids: list[int], stop_ids: frozenset[int], length: int) -> list[int]:
    """The greedy answer without any cache from before."""
    steps = generate_tokens(model.llma, [ids], max_gen_len=length, max_seq_len=model.max_seq_len, stop_ids=stop_ids)
    return [token for (token,) in steps]


class Watched:
    """A conversation whose prompts, answers (as ids) and numbers of computed tokens are noted."""

    def __init__(self, model: MetaModel, monkeypatch: pytest.MonkeyPatch, **options) -> None:
        self.talk, self.model = Conversation(model, **options), model
        self.asked: list[tuple[list[int], frozenset[int], int]] = []
        self.answers: list[list[int]] = []
        self.computed: list[int] = []
        original = model.steps

        def steps(ids, stop_ids, how, **rest):
            self.asked.append((ids[0], stop_ids, how.max_gen_len))
            self.answers.append([])
            self.computed.append(0)
            for (token,) in original(ids, stop_ids, how, **rest):
                self.answers[-1].append(token)
                yield [token]

        monkeypatch.setattr(model, "steps", steps)
        model.llma.tok_embeddings.register_forward_hook(self.count)

    def count(self, module, inputs, output) -> None:
        """Add the tokens of a call."""
        if self.computed:
            self.computed[-1] += len(inputs[0])

    def check(self) -> None:
        """Every answer is, token for token, that of its prompt from scratch."""
        computed = list(self.computed)
        for asked, answer in zip(self.asked, self.answers, strict=True):
            assert answer and answer == tokens_from_scratch(self.model, *asked)
        self.computed = computed


@pytest.mark.parametrize(
    ("template", "layout"), [(TEMPLATE, CHAT), (SHORTENS, CHAT), (WITHOUT_END, CHAT), (None, DIALOG)]
)
def test_turns_equal_those_from_scratch(load, monkeypatch, template, layout) -> None:
    """Five turns, then a retry, an undo, other words of the system, a question more; and messages give the prompt."""
    watched = Watched(load(template), monkeypatch)
    talk = watched.talk
    assert talk.prompt_layout == layout and talk.remembers
    for question in QUESTIONS:
        last(talk.ask(question, max_gen_len=9))
    last(talk.retry(max_gen_len=14))
    assert talk.undo() == QUESTIONS[-1]
    assert talk.undo() == QUESTIONS[-2]
    last(talk.ask("Again?", max_gen_len=9))
    talk.system = "Be brief."
    last(talk.ask("And now?", max_gen_len=9))
    watched.check()
    assert [turn.question for turn in talk.history] == [*QUESTIONS[:3], "Again?", "And now?"]
    assert talk.messages[0] == {"role": "system", "content": "Be brief."} and len(talk.messages) == 11
    if layout == CHAT:
        assert watched.asked[-1][0] == talk._model.chat.ids(talk.messages[:-1])
    assert len({tuple(answer) for answer in watched.answers}) > 4


def test_what_is_kept_is_not_computed_again(load, monkeypatch) -> None:
    """Of each prompt only what follows the longest beginning in common; its last token always is."""
    watched = Watched(load(TEMPLATE), monkeypatch)
    talk, known = watched.talk, []
    for number, question in enumerate([*QUESTIONS, None]):
        last(talk.ask(question, max_gen_len=9) if question else talk.retry(max_gen_len=9))
        (prompt, _, _), answer = watched.asked[-1], watched.answers[-1]
        common = next((i for i, pair in enumerate(zip(known, prompt, strict=False)) if len(set(pair)) > 1), len(known))
        assert watched.computed[number] == len(prompt) - min(common, len(prompt) - 1) + len(answer) - 1
        assert number == 0 or common > 0.5 * len(known)
        known = prompt + answer[:-1]
    assert watched.computed[-1] == len(watched.answers[-1])  # a retry computes the prompt's last token alone
    talk.clear()
    last(talk.ask(QUESTIONS[0], max_gen_len=9))
    assert watched.computed[-1] == watched.computed[0]


def test_dialog_is_laid_out_as_training_does(load) -> None:
    """Earlier answers end with the layout's mark; other words of the system take the place of its own."""
    model, seen = load(), []
    talk = Conversation(model, prompt_layout=DIALOG)
    tokens = model.whole_prompt_tokens
    model.whole_prompt_tokens = lambda prompt, picture: seen.append(prompt) or tokens(prompt, picture)
    talk.history = [Turn("Hi", "Hello", "end")]
    last(talk.ask("Who?", max_gen_len=2))
    middle = ("\n### Human:", " Hi\n###", " Assistant:", " Hello\n###", " Human:", " Who?\n###", " Assistant:")
    assert seen == [DialogPrompt((DIALOG_SYSTEM + "\n", *middle))]
    talk.undo()
    talk.system = "Be brief."
    last(talk.ask("Who?", max_gen_len=2))
    assert seen[1] == DialogPrompt(("Be brief.\n", *middle))


@pytest.mark.parametrize("layout", ["alpaca", "none"])
def test_single_question_layouts_ask_each_alone(load, monkeypatch, layout: str) -> None:
    watched = Watched(load(TEMPLATE), monkeypatch, prompt_layout=layout)
    for question in QUESTIONS[:2]:
        last(watched.talk.ask(question, max_gen_len=9))
        prompt = watched.model.question(question, prompt_layout=layout)
        assert watched.asked[-1][0] == watched.model.prompt_tokens(prompt)
    watched.check()
    assert not watched.talk.remembers and not watched.talk.note
    with pytest.raises(ConfigError, match=f"layout {layout} has no place for words of the system: expected chat or"):
        watched.talk.system = "Be brief."


def test_the_layout_that_training_saved_is_followed(load) -> None:
    """Else the chat template, else the layout of conversations."""
    model = load(TEMPLATE)
    assert Conversation(model).prompt_layout == CHAT
    for layouts in (("none", "alpaca"), ("alpaca",), (DIALOG,)):
        model.prompt_layouts = layouts
        assert Conversation(model).prompt_layout == layouts[0]
    assert Conversation(load()).prompt_layout == DIALOG
    with pytest.raises(TokenizerError, match="no chat template"):
        Conversation(load(), prompt_layout=CHAT)
    with pytest.raises(ConfigError, match=r"prompt layout 'chta' is unknown\. Did you mean 'chat'"):
        Conversation(model, prompt_layout="chta")
    with pytest.raises(TokenizerError, match="leaves out what the role 'system' says"):
        Conversation(load(WITHOUT_SYSTEM), "Be brief.")


def test_history_that_is_too_long_is_cut_at_whole_turns(load, monkeypatch) -> None:
    """The oldest go, a few at once, so that the next turns find their beginning computed; a retry sees the same."""
    watched = Watched(load(TEMPLATE, max_seq_len=160), monkeypatch)
    talk, firsts = watched.talk, []
    for number in range(14):
        last(talk.ask(f"Question number {number}?", max_gen_len=20))
        turn = talk.history[-1]
        firsts.append(turn.first)
        prompt = watched.asked[-1][0]
        assert prompt == watched.model.chat.ids(talk.messages[2 * turn.first : -1]) and len(prompt) <= 140
        assert bool(talk.note) == bool(turn.first)
    assert "earlier turns left out: the model takes 160 tokens, an answer included (--max_seq_len)." in talk.note
    assert talk.note.startswith(f"{firsts[-1]} of the 13")
    assert firsts == sorted(firsts) and firsts[-1] > 3 and len(set(firsts)) < firsts[-1]
    while talk.history[-1].first != talk.history[-2].first:  # a question that needed no cut
        last(talk.ask("One more?", max_gen_len=20))
    last(talk.retry(max_gen_len=20))
    assert watched.asked[-1] == watched.asked[-2]
    watched.check()
    while talk.history:
        talk.undo()
    last(talk.ask("From the beginning?", max_gen_len=4))
    assert talk.history[0].first == 0 and not talk.note
    with pytest.raises(ConfigError, match=r"The question has \d+ tokens; expected less than 160 \(--max_seq_len\)"):
        next(talk.ask("long " * 200))
    assert len(talk.history) == 1


def test_a_stopped_answer_keeps_what_was_said(load, monkeypatch) -> None:
    """By leaving the iterator, and from elsewhere; the next turn goes on from it."""
    watched = Watched(load(TEMPLATE), monkeypatch)
    talk = watched.talk
    for shown in talk.ask("One?", max_gen_len=30):
        text = shown
        if len(watched.answers[-1]) >= 6:
            break
    assert talk.history[0].answer == text and talk.history[0].ended == "stopped"
    for shown in talk.ask("Two?", max_gen_len=30):
        text = shown
        if len(watched.answers[-1]) >= 4:
            talk.stop()
    assert talk.history[1].answer == text and talk.history[1].ended == "stopped" and len(watched.answers[1]) < 6
    last(talk.ask("Three?", max_gen_len=5))
    assert talk.history[2].ended == "length"
    assert watched.asked[2][0] == watched.model.chat.ids(talk.messages[:-1])
    assert watched.answers[2] == tokens_from_scratch(watched.model, *watched.asked[2])


def test_a_repeated_seed_is_moved_on(load) -> None:
    """Retries draw other answers, the same ones in another conversation; a seed draws what `generate` draws."""
    model, how = load(TEMPLATE), {"max_gen_len": 12, "temperature": 1.0, "top_p": 1.0, "seed": 3}
    drawn = []
    for _ in range(2):
        talk = Conversation(model)
        drawn.append([last(talk.ask("One?", **how)), last(talk.retry(**how)), last(talk.retry(**how))])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3
    assert drawn[0][0] == model.generate([talk.messages[:1]], **how)[0]


def test_wrong_calls_are_refused(load) -> None:
    """They leave the conversation as it was."""
    talk = Conversation(load(TEMPLATE))
    for call in (talk.retry, lambda: iter([talk.undo()])):
        with pytest.raises(ConfigError, match="There is no turn to"):
            next(call())
    for question in ("", " \n"):
        with pytest.raises(ConfigError, match="The question is empty"):
            next(talk.ask(question))
    with pytest.raises(ConfigError, match="question is None; expected a text"):
        next(talk.ask(None))
    with pytest.raises(ConfigError, match=r"unknown key 'topp'\. Did you mean 'top_p'"):
        next(talk.ask("One?", topp=0.5))
    assert talk.history == []
    answer = talk.ask("One?", max_gen_len=5)
    next(answer)
    for call in (lambda: next(talk.ask("Two?")), talk.undo, talk.clear):
        with pytest.raises(ConfigError, match="An answer is being given"):
            call()
    answer.close()
    assert talk.undo() == "One?"


def test_a_failed_answer_leaves_no_turn(load, monkeypatch) -> None:
    talk = Conversation(load(TEMPLATE))
    last(talk.ask("One?", max_gen_len=3))
    monkeypatch.setattr(talk._model.llma, "prepare_decoding", lambda: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):
        next(talk.ask("Two?"))
    monkeypatch.undo()
    assert len(talk.history) == 1 and last(talk.ask("Two?", max_gen_len=3)) == talk.history[1].answer


def test_an_answer_that_is_cut_in_a_character(load, monkeypatch) -> None:
    """Half an emoji is held back until the end; the next turns go on from what was shown."""
    model, said = load(TEMPLATE), []
    monkeypatch.setattr(answers, "generate_tokens", lambda *_, max_gen_len, stopped, **__: (
        [token] for token in said[:max_gen_len] if not stopped()))  # fmt: skip
    said[:] = model.tokenizer.encode("ab\N{GRINNING FACE}.")
    assert len(said) == 7
    talk = Conversation(model)
    assert list(talk.ask("One?", max_gen_len=7)) == ["a", "ab", "ab\N{GRINNING FACE}", "ab\N{GRINNING FACE}."]
    assert list(talk.ask("Two?", max_gen_len=4)) == ["a", "ab", "ab\N{REPLACEMENT CHARACTER}"]
    assert talk.history[1].ended == "length"
    assert list(talk.ask("Three?", stop="\N{GRINNING FACE}")) == ["a", "ab"]
    assert list(talk.ask("Four?", stop=["b\N{GRINNING FACE}", "."])) == ["a"]
    assert [turn.answer for turn in talk.history[2:]] == ["ab", "a"]
    assert model.chat.ids(talk.messages) == model.whole_prompt_tokens(talk.messages)


def test_what_is_no_text_is_refused(load) -> None:
    """Bytes of a terminal that are no UTF-8 arrive as halves of surrogate pairs."""
    talk = Conversation(load(TEMPLATE))
    for call in (lambda: next(talk.ask("\udcff")), lambda: setattr(talk, "system", "\ud800")):
        with pytest.raises(ConfigError, match="half of a surrogate pair"):
            call()
    assert not talk.history and talk.system is None


def test_stopped_while_the_question_is_laid_out(load, monkeypatch) -> None:
    """It ends the answer that is about to begin."""
    talk = Conversation(load(TEMPLATE))
    tokens = talk._model.whole_prompt_tokens
    monkeypatch.setattr(talk._model, "whole_prompt_tokens", lambda *asked: talk.stop() or tokens(*asked))
    assert list(talk.ask("One?", max_gen_len=300)) == []
    assert talk.history[0].ended == "stopped"


def test_records_to_train_on(load) -> None:
    """One of the whole conversation; of questions that were asked alone one each; none of those without an answer."""
    for layout, expected in ((CHAT, [["A", "1", "C", "3"]]), ("alpaca", [["A", "1"], ["C", "3"]])):
        talk = Conversation(load(TEMPLATE), prompt_layout=layout)
        talk.history = [Turn("A", "1", "end"), Turn("B", "", "stopped"), Turn("C", "3", "end")]
        assert [[each["content"] for each in record["messages"]] for record in talk.records] == expected
        talk.history = talk.history[1:2]
        assert talk.records == [] and len(talk.messages) == 2


def test_two_ranks_talk_as_one(tiny_base: Path, tmp_path: Path, python, torchrun) -> None:
    """Two conversations in turn, greedy and drawn, an answer left in its middle, one ended by a text, one cleared."""
    worker = Path(__file__).with_name("conversation_worker.py")
    runs = [python(worker, tiny_base, tmp_path / "1", "1"), torchrun(2, worker, tiny_base, tmp_path / "2", "2")]
    for done in runs:
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / name).read_text()) for name in "12")
    assert one == two and len(set(one["answers"][1])) == 2
    assert one["answers"][0] == one["answers"][2] and one["cut"] > 0


ASKED = [("What is QST?", "A side network."), ("Is it fast?", "Yes, it is.")]
TRAINED = {
    CHAT: ({"messages": [{"role": role, "content": words} for pair in ASKED
                         for role, words in zip(("user", "assistant"), pair, strict=True)]}, CHAT, False),
    DIALOG: ({"conversations": [{"from": role, "value": words} for pair in ASKED
                                for role, words in zip(("human", "gpt"), pair, strict=True)]}, "alpaca", True),
    "alpaca": (dict(zip(("instruction", "output"), ASKED[1], strict=True)), "alpaca", False),
    "none": (dict(zip(("instruction", "output"), ASKED[1], strict=True)), "none", False),
}  # fmt: skip
"""Layout -> a record, its prompt_type, and whether --dialog is given."""


@pytest.mark.parametrize("layout", TRAINED)
def test_asked_as_it_was_trained(layout: str, tiny_base, lora_config, load, tmp_path: Path, monkeypatch) -> None:
    """With no flag, what a trained part is asked is, token for token, what stood before that answer in training."""
    record, prompt_type, dialog = TRAINED[layout]
    (tmp_path / "data.json").write_text(json.dumps([record] * 4))
    (tmp_path / "data.yaml").write_text(f"META: [{{path: data.json, prompt_type: {prompt_type}}}]")
    finetune(FinetuneConfig(
        pretrained_path=[tiny_base], tokenizer_path=load(TEMPLATE).tokenizer.source, llama_type="llama_peft",
        llama_config=[lora_config], data_config=tmp_path / "data.yaml", dialog=dialog, device="cpu", batch_size=2,
        accum_iter=1, max_steps=1, max_words=200, only_save_trainable=True, output_dir=tmp_path / "out",
    ))  # fmt: skip
    (part,) = (tmp_path / "out").glob("epoch*")
    model = MetaModel.from_pretrained(part, dtype="fp32", max_seq_len=300)
    watched = Watched(model, monkeypatch)
    assert watched.talk.prompt_layout == layout
    if watched.talk.remembers:
        watched.talk.history = [Turn(*ASKED[0], "end")]
    last(watched.talk.ask(ASKED[1][0], max_gen_len=3))
    corpus = build_corpus(tmp_path / "data.yaml", model.tokenizer, max_words=200, dialog=dialog)
    begin = corpus.offsets[-2]  # of the last document, which holds the last answer
    learned = corpus.learned[begin:].tolist()
    answers = [place for place, now in enumerate(learned) if now and not learned[place - 1]]
    assert watched.asked[0][0] == corpus.tokens[begin:][: answers[-1]].tolist()
