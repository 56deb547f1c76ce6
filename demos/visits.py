"""The conversations of a page's visitors: each has its own, and what they hold in memory is bounded."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable

from accessory.conversation import Conversation

MOST_VISITS = 64  # conversations that are remembered


class Visits:
    """Conversations by the name of the visitor's window; beyond a number the one used least recently is forgotten.

    Of keys and values, which take far more memory than words, only those of the last `kept_caches` are kept.
    """

    def __init__(self, begin: Callable[[], Conversation], kept_caches: int) -> None:
        """begin: makes an empty conversation. kept_caches: how many keep their keys and values."""
        self._begin, self._kept_caches = begin, kept_caches
        self._conversations: OrderedDict[str, Conversation] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, name: str | None) -> Conversation:
        """The conversation of a window, a new one where there is none; without a name it is nobody else's."""
        with self._lock:
            name = name or secrets.token_hex()
            if name not in self._conversations:
                self._conversations[name] = self._begin()
            self._conversations.move_to_end(name)
            while len(self._conversations) > MOST_VISITS:
                self._conversations.popitem(last=False)
            return self._conversations[name]

    def all(self) -> list[Conversation]:
        """All that are remembered."""
        with self._lock:
            return list(self._conversations.values())

    def end(self, name: str | None) -> None:
        """Forget the conversation of a window that was closed."""
        with self._lock:
            self._conversations.pop(name, None)

    def make_room(self) -> None:
        """Free keys and values of all but the last `kept_caches`. Nobody may be answered meanwhile."""
        with self._lock:
            for conversation in list(self._conversations.values())[: -self._kept_caches]:
                conversation.drop_cache()
