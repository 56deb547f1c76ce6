"""A conversation with a model: turns, the words of the system, and what was computed for earlier turns.

On several ranks the main one talks, and the others `follow`: they are sent token ids, so that layout, history and
tokenizing happen on one rank only.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch.distributed as dist

from accessory.data.pictures import Picture
from accessory.data.templates import CHAT, DIALOG, PROMPT_LAYOUTS, conversation_prompt
from accessory.errors import ConfigError, check_known
from accessory.generate import KeptCache
from accessory.meta import MetaModel, Prompt, Sampling
from accessory.meta.images import TRANSFORM, Image

_FREE = 4  # a history that is too long is cut until one part in so many is free, so that the next turns need no cut
_NUMBERS = itertools.count()
_GONE: list[int] = []
"""Numbers of conversations that are over, until the other ranks are told to drop what they keep of them."""


@dataclass
class Turn:
    """A question and what was answered so far.

    ended: by the model itself (`end`), by max_gen_len or the model's length (`length`), by the user (`stopped`); empty
    while the answer is being given. first: number of the oldest turn that the model saw when it answered. attempt: how
    often the answer was asked for again before.
    """

    question: str
    answer: str = ""
    ended: Literal["", "end", "length", "stopped"] = ""
    first: int = 0
    attempt: int = 0


class Request(NamedTuple):
    """What all ranks need to compute an answer. conversation: number of the one it belongs to; gone: of those over.

    picture: whose rows stand in `ids`.
    """

    conversation: int
    ids: list[int]
    stop_ids: frozenset[int]
    how: Sampling
    gone: tuple[int, ...]
    picture: Picture | None = None


class Conversation:
    """Questions to one model that remember what was said before, perhaps about an image.

    The layout of the prompt is the one that the model was trained on; of a base, its chat template, or the layout
    `dialog` where it has none. In `chat` and `dialog` the model sees earlier turns. All other layouts are of single
    questions, and a model that was trained on those has never seen two: each question is asked alone (`remembers`).

    The key/value cache is kept between turns: of a prompt, only what follows the longest beginning in common with what
    was computed before is computed, whatever undo, retry, other system words or the template have changed. Answers are
    those that the same turns give from scratch.

    An image stands where the prompt of a single question has it: before all turns, whichever of them are left out.

    picture: what all turns are about, see `look_at`. image_file: the path it was given as, if any. history: the turns,
    oldest first; may be replaced by turns of an earlier conversation. prompt_layout: how questions are laid out. note:
    what the user should know of the last question, such as turns that were left out; else empty.

    One answer at a time: a model that several conversations share must not be asked by two threads at once.
    """

    def __init__(
        self,
        model: MetaModel,
        system: str | None = None,
        *,
        prompt_layout: str | None = None,
        image: Image | None = None,
        image_transform: str = TRANSFORM,
    ) -> None:
        """system: words before the first turn; absent: as in training. prompt_layout: one of `PROMPT_LAYOUTS`.

        image, image_transform: as in `look_at`, which says what they raise. Raises `ConfigError` for a layout we do not
        have, and for system words where it has no place for them; `TokenizerError` for `chat` without a chat template,
        or with one that leaves out system words.
        """
        trained = model.prompt_layouts[0] if model.prompt_layouts else None
        own = CHAT if model.tokenizer.chat_template is not None else DIALOG
        self.prompt_layout = prompt_layout or trained or own
        check_known("prompt layout", self.prompt_layout, PROMPT_LAYOUTS)
        if self.prompt_layout == CHAT:
            _ = model.chat  # says what is missing before anybody asks
        self._model, self._answering, self._stopping = model, threading.Lock(), False
        self.look_at(image, image_transform)
        self.system = model.system if system is None and self.remembers else system

    @property
    def remembers(self) -> bool:
        """Whether the model sees earlier turns: in the layouts `chat` and `dialog`."""
        return self.prompt_layout in (CHAT, DIALOG)

    @property
    def system(self) -> str | None:
        """The words before the first turn; None: the layout's own. Assigning others raises as `__init__` does."""
        return self._system

    @system.setter
    def system(self, words: str | None) -> None:
        """Raises `ConfigError` for what is no text, and where the prompt layout has no place for it."""
        if words is not None and not isinstance(words, str):
            raise ConfigError(f"The system's words are {words!r}; expected a text.")
        if words is not None and not self.remembers:
            raise ConfigError(
                f"The prompt layout {self.prompt_layout} has no place for words of the system: expected {CHAT} or "
                f"{DIALOG}."
            )
        if words is not None and self.prompt_layout == CHAT:
            self._model.whole_prompt_tokens(conversation_prompt([], "a", CHAT, words))
        self._system = words

    @property
    def messages(self) -> list[dict[str, str]]:
        """What was said, as messages with `role` (system, user, assistant) and `content`."""
        return self._said(self.history)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The same as records to train on: one, or one of each turn where questions are asked alone.

        Questions without an answer are left out. `image` is the path of the picture, if it was given as one.
        """
        turns = [turn for turn in self.history if turn.answer.strip()]
        together = [turns] if self.remembers else [[turn] for turn in turns]
        image = {} if self.image_file is None else {"image": str(self.image_file)}
        return [image | {"messages": self._said(part)} for part in together if part]

    def look_at(self, image: Image | None, image_transform: str = TRANSFORM) -> None:
        """Begin a new conversation, about this image, or about none.

        image, image_transform: as `MetaModel.picture` takes them, and what it raises: what was said then stays.
        """
        self._check_idle()
        picture = self._model.picture(image, image_transform)
        self.image_file = Path(image) if isinstance(image, str | Path) else None
        self.history, self.note, self.picture = [], "", picture
        self._begin_anew()

    def ask(self, question: str, **sampling: Any) -> Generator[str, None, None]:
        """The answer so far, each time it grows; the turn is in `history` from the first step on.

        sampling: as `MetaModel.generate` takes it. Whoever leaves the iterator early (`break`, `close`), or calls
        `stop`, ends the answer on all ranks; what was said of it stays. The iterator raises, at its first step,
        `ConfigError` for a question without words, one too long for the model, wrong sampling, or while another answer
        is being given.
        """
        first = self.history[-1].first if self.history else 0
        yield from self._answers(Turn(question, first=first), len(self.history), sampling)

    def retry(self, **sampling: Any) -> Generator[str, None, None]:
        """Answer the last question again, as `ask` does; a repeated seed is moved on, so that another answer is drawn.

        The iterator raises `ConfigError` where nothing has been asked, too.
        """
        last = self._last("retry")
        again = Turn(last.question, first=last.first, attempt=last.attempt + 1)
        yield from self._answers(again, len(self.history) - 1, sampling)

    def undo(self) -> str:
        """Take back the last turn, and return its question. Raises `ConfigError` where there is none."""
        question = self._last("take back").question
        self._check_idle()
        self.history.pop()
        return question

    def clear(self) -> None:
        """Forget all turns, and what was computed of them; the system's words and the picture stay."""
        self._check_idle()
        self.history, self.note = [], ""
        self._begin_anew()

    def drop_cache(self) -> None:
        """Free what was computed of the turns: the next answer begins with computing them again."""
        self._check_idle()
        if self._kept.tokens:
            self._begin_anew()

    def wait(self) -> None:
        """Return once no answer is being given."""
        with self._answering:
            pass

    def stop(self) -> None:
        """End the answer that is being given at its next token; another thread may call this."""
        self._stopping = True

    def _answers(self, turn: Turn, place: int, sampling: dict[str, Any]) -> Iterator[str]:
        """Answer `turn`, which becomes number `place` of the history, in place of a turn that is there."""
        self._check_idle()
        self._stopping = False  # before anything that takes time, so that `stop` counts from the beginning
        how = Sampling.of(**sampling)
        how = how.model_copy(update={"seed": how.seed + turn.attempt})
        prompt, ids = self._fitting(turn, self.history[:place], how)
        gone = tuple(_GONE.pop() for _ in range(len(_GONE)))  # others may be added meanwhile
        request = Request(self._number, ids, self._model.stop_ids([prompt]), how, gone, self.picture)
        with self._answering:
            _send(request)
            self.history[place:] = [turn]
            steps = self._steps(request, turn)
            try:
                for turn.answer in self._model.texts(prompt, steps, how.stop):
                    yield turn.answer
            except GeneratorExit:
                self._stopping = True
                raise
            except Exception:  # whatever it was, it goes on to the caller, and leaves no half turn behind
                del self.history[place:]
                raise
            finally:
                turn.ended = "stopped" if self._stopping else turn.ended or "end"
                self._stopping = True
                for _ in steps:  # the other ranks are in the middle of a step, and end behind it
                    pass

    def _steps(self, request: Request, turn: Turn) -> Iterator[list[int | None]]:
        """The answer's tokens; says in `turn` when there can be no more."""
        room = min(request.how.max_gen_len, self._model.max_seq_len - len(request.ids))
        for produced, step in enumerate(
            _steps(self._model, request, self._kept, lambda: {0} if self._stopping else ()), 1
        ):
            turn.ended = "length" if produced == room else ""
            yield step

    def _fitting(self, turn: Turn, earlier: list[Turn], how: Sampling) -> tuple[Prompt, list[int]]:
        """The prompt of a turn and its ids, without the oldest turns where it would be too long. Raises `ConfigError`.

        Half of the model's length at most is kept free for the answer.
        """
        longest = self._model.max_seq_len
        room = longest - max(min(how.max_gen_len, longest // 2), 1)
        turn.first = min(turn.first, len(earlier)) if self.remembers else len(earlier)
        prompt, ids = self._prompt(turn, earlier)
        if len(ids) > room:
            while turn.first < len(earlier) and len(ids) > room - room // _FREE:
                turn.first += 1
                prompt, ids = self._prompt(turn, earlier)
        if len(ids) >= longest:
            raise ConfigError(f"The question has {len(ids)} tokens; expected less than {longest} (--max_seq_len).")
        left_out = f"{turn.first} of the {len(earlier)} earlier turns" if turn.first > 1 else "The oldest turn"
        why = f"the model takes {longest} tokens, an answer included (--max_seq_len)"
        self.note = f"{left_out} left out: {why}." if self.remembers and turn.first else ""
        return prompt, ids

    def _prompt(self, turn: Turn, earlier: list[Turn]) -> tuple[Prompt, list[int]]:
        asked = self._model.question(turn.question, prompt_layout=self.prompt_layout)
        if not turn.question.strip() and self.prompt_layout != "caption":
            raise ConfigError("The question is empty.")
        if self.remembers:
            seen = [(old.question, old.answer) for old in earlier[turn.first :]]
            asked = conversation_prompt(seen, turn.question, self.prompt_layout, self.system)
        return asked, self._model.whole_prompt_tokens(asked, self.picture)

    def _said(self, turns: list[Turn]) -> list[dict[str, str]]:
        said = [] if self.system is None else [("system", self.system)]
        for turn in turns:
            said += [("user", turn.question), ("assistant", turn.answer)]
        return [{"role": role, "content": words} for role, words in said]

    def _last(self, what: str) -> Turn:
        if not self.history:
            raise ConfigError(f"There is no turn to {what}.")
        return self.history[-1]

    def _check_idle(self) -> None:
        if self._answering.locked():
            raise ConfigError("An answer is being given: stop it, or wait for its end.")

    def _begin_anew(self) -> None:
        """Drop what was computed, here and, with the next request, on the other ranks."""
        if hasattr(self, "_over"):
            self._over()
        self._kept, self._number = KeptCache(), next(_NUMBERS)
        self._over = weakref.finalize(self, _GONE.append, self._number)


def follow(model: MetaModel) -> None:
    """Compute along, on a rank that is not the main one, until the main rank calls `dismiss`."""
    caches: dict[int, KeptCache] = {}
    while (request := _receive()) is not None:
        for number in request.gone:
            caches.pop(number, None)
        kept = caches.setdefault(request.conversation, KeptCache())
        with suppress(ConfigError):  # the main rank raises the same and reports it
            for _ in _steps(model, request, kept):
                pass


def dismiss() -> None:
    """Let the other ranks return from `follow`. Called by the main rank, when it talks no more."""
    _send(None)


def _steps(
    model: MetaModel, request: Request, kept: KeptCache, stopped: Callable[[], Collection[int]] | None = None
) -> Iterator[list[int | None]]:
    pictures = [request.picture]
    return model.steps([request.ids], request.stop_ids, request.how, kept=kept, stopped=stopped, pictures=pictures)


def _send(request: Request | None) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        if dist.get_rank() != 0:
            raise ConfigError("Only the main rank holds conversations; the others call follow(model).")
        dist.broadcast_object_list([request], src=0)


def _receive() -> Request | None:
    message: list[Request | None] = [None]
    dist.broadcast_object_list(message, src=0)
    return message[0]
