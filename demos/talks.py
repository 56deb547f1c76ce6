"""What visitors do with their conversations: one is answered at a time, each with what was said to it alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

from accessory.config import ChatPageConfig
from accessory.conversation import Conversation
from accessory.errors import ConfigError
from accessory.meta import MetaModel
from accessory.parallel.allocator import give_back_freed_memory
from demos.page_serving import check_text
from demos.sent_images import image_bytes
from demos.visits import Visits

MOST_TURNS = 200  # of a conversation
_PATIENCE = 10  # seconds for the last token of an answer that is stopped because the page is closed
Answers = Generator[Conversation, None, None]


class Talks:
    """What visitors do with their conversations, told apart by the names of their windows.

    empty: a conversation that nobody has, for what all have in common.
    """

    def __init__(self, model: MetaModel, config: ChatPageConfig) -> None:
        """Raises what `Conversation` does."""

        def begin() -> Conversation:
            """An empty conversation."""
            return Conversation(model, config.system, prompt_layout=config.system_prompt)

        self.empty, self._model = begin(), model
        self._visits, self._one_at_a_time = Visits(begin, config.kept_caches), threading.Lock()

    def of(self, name: str | None, wait: bool = True) -> Conversation:
        """The conversation of a window, once it is not being answered unless `wait` is False."""
        conversation = self._visits.of(name)
        if wait:
            conversation.wait()
        return conversation

    def look(self, name: str | None, image: object, transform: object) -> Conversation:
        """The window's conversation, begun anew about what came as an image, perhaps none. Raises `AccessoryError`."""
        conversation = self._visits.of(name)
        conversation.look_at(image_bytes(image), transform)
        return conversation

    def stop(self, name: str | None) -> None:
        """End the answer that a window is being given."""
        self._visits.of(name).stop()

    def leave(self, name: str | None) -> None:
        """The window was closed."""
        self._visits.end(name)

    def close(self) -> bool:
        """Take no more questions; whether no answer is being given now, so that other ranks wait for a question."""
        for conversation in self._visits.all():
            conversation.stop()
        return self._one_at_a_time.acquire(timeout=_PATIENCE)

    def ask(
        self, name: str | None, question: object, system: object, sampling: dict[str, Any], *image: object
    ) -> Answers:
        """The window's conversation, each time the answer to a question has grown. Raises `AccessoryError`.

        image: what came as an image, and the transform, where there may be one: another one than that of the
        conversation begins it anew, which has been forgotten perhaps.
        """
        check_text("The question", question)
        picture = self._model.picture(image_bytes(image[0]), image[1]) if image else None
        if image and picture != self._visits.of(name).picture:
            self._visits.of(name).look_at(picture)
        if len(self._visits.of(name).history) >= MOST_TURNS:
            raise ConfigError(f"A conversation has at most {MOST_TURNS} turns: clear it, or take some back.")
        yield from self._answer(name, system, lambda conversation: conversation.ask(question, **sampling))

    def retry(self, name: str | None, system: object, sampling: dict[str, Any]) -> Answers:
        """The same for another answer to the last question."""
        yield from self._answer(name, system, lambda conversation: conversation.retry(**sampling))

    def _answer(self, name: str | None, system: object, answer: Callable[[Conversation], Generator]) -> Answers:
        check_text("The system's words", system or "")
        conversation = self._visits.of(name)
        with self._one_at_a_time:
            self._visits.make_room()
            conversation.system = system or None
            try:
                with closing(answer(conversation)) as answering:
                    for _ in answering:
                        yield conversation
            finally:
                give_back_freed_memory()  # the next one may be answered by another thread, in a heap of its own
